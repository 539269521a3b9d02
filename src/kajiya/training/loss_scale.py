"""The factor on a loss computed in fp16, so that small gradients do not vanish (arXiv:1710.03740, section 3.2)."""

from typing import Any

_BEGIN = 65_536.0
_GOOD_STEPS = 2_000


class LossScale:
    """Halved when a gradient overflows, doubled after 2,000 steps without; 1 throughout when it is off."""

    def __init__(self, is_on: bool) -> None:
        self.is_on = is_on
        self.factor = _BEGIN if is_on else 1.0
        self._good = 0

    def stepped(self) -> None:
        """A step went well."""
        if self.is_on:
            self._good += 1
            if self._good == _GOOD_STEPS:
                self.factor, self._good = 2 * self.factor, 0

    def overflowed(self) -> bool:
        """A gradient was not finite; whether the scale can be the reason, and was halved."""
        is_reason = self.is_on and self.factor > 1
        if is_reason:
            self.factor, self._good = self.factor / 2, 0
        return is_reason

    def state(self) -> dict[str, Any]:
        """What a resume needs."""
        return {"factor": self.factor, "good": self._good}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.factor, self._good = float(state["factor"]), int(state["good"])
