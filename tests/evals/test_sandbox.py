"""Answers that try to pass without passing their tests."""

import textwrap
from typing import Any

import pytest

from kajiya.evals.sandbox import run_program, whole_lines

_TEST = "assert f(1) == 1"
_WRITE = """
    for word in found:
        for fd in range(3, 20):
            try:
                os.write(fd, word)
            except OSError:
                pass
    os._exit(0)
"""
_HUNT = """
    import gc, os, sys
    def hunt(mine):
        seen, found, todo = set(), set(), [*gc.get_objects(), *sys._current_frames().values()]
        frame = sys._getframe()
        while frame is not None:
            todo += [frame, frame.f_locals, frame.f_globals, frame.f_builtins, frame.f_code, frame.f_code.co_consts]
            frame = frame.f_back
        while todo:
            each = todo.pop()
            if id(each) not in seen:
                seen.add(id(each))
                todo += gc.get_referents(each)
                if isinstance(each, bytes) and len(each) == 16:
                    found.add(each)
        return found
    def within_a_frame():
        mine = os.urandom(16)
        return hunt(id(mine)) if mine in hunt(0) else os.abort()  # which shows that it finds what lies in frames
    found = within_a_frame()
"""
_TRICKS = {
    "constants of its own frame": "import os, sys\nfound = [each for each in sys._getframe().f_code.co_consts "
    "if isinstance(each, bytes)] or [b'x' * 16]" + textwrap.dedent(_WRITE),
    "everything that frames and the collector reach": textwrap.dedent(_HUNT + _WRITE),
    "what its sockets and pipes hold": textwrap.dedent("""
        import os
        found = []
        for fd in range(3, 20):
            try:
                os.set_blocking(fd, False)
                found.append(os.read(fd, 16))
            except OSError:
                pass
        """)
    + textwrap.dedent(_WRITE),
    "its starter anew, over another program": """
        import os, sys
        starter = sys._getframe().f_back
        read, write = os.pipe()
        os.write(write, b"pass")
        os.close(write)
        os.dup2(read, 0)
        line = starter.f_locals["line"]
        os.set_blocking(line, False)
        os.execv(sys.executable, [sys.executable, "-I", "-S", starter.f_code.co_filename, str(line)])
        """,
    "an end at the first failure": "import os, sys\nsys.excepthook = lambda *_: os._exit(0)",
    "an end behind its failure": "import atexit, os\natexit.register(os._exit, 0)",
    "another AssertionError": "import builtins\nbuiltins.AssertionError = SystemExit",
    "another exec and write": """
        import builtins, posix
        builtins.exec = posix.write = posix.read = lambda *_: 0
        """,
    "a thread that ends it": """
        import os, threading
        def f(x):
            threading.Thread(target=os._exit, args=(0,)).start()
            while True:
                pass
        """,
    "a copy of itself": "import os\nif os.fork():\n    os.wait()\n    os._exit(0)",
    "its watcher killed": "import os\nos.kill(os.getppid(), 9)\nos._exit(0)",
    "its watcher stopped": "import os\nos.kill(os.getppid(), 15)\nos._exit(0)",
    "a jump over its tests": """
        import sys
        def jump(frame, event, _):
            if event == "line":
                frame.f_lineno = LAST
            return jump
        sys._getframe().f_trace = jump
        sys.settrace(jump)
        """,
    "a jump, by way of another sys": """
        import sys
        own = sys._getframe()
        del sys.modules["sys"]
        import sys
        def jump(frame, event, _):
            if event == "line":
                frame.f_lineno = LAST
            return jump
        own.f_trace = jump
        sys.settrace(jump)
        """,
}


def _run(source: str, seconds: float = 20.0) -> Any:
    return run_program(source, seconds=seconds, memory_mb=512)


@pytest.mark.parametrize("trick", _TRICKS)
def test_an_answer_that_fails_its_test_does_not_pass_by(trick: str) -> None:
    answer = textwrap.dedent(_TRICKS[trick])
    if "def f(" not in answer:
        answer = f"def f(x): return 0\n{answer}"
    last = len(answer.splitlines()) + 2
    found = _run(f"{answer}\n{_TEST}\nend = 1\n".replace("LAST", str(last)))
    assert not found.is_passed
    assert "timed out" not in found.reason
    assert "SIGABRT" not in found.reason
    if "jump" in trick:
        assert "RuntimeError" in found.reason


def test_a_line_of_a_test_is_not_taken_by_the_answer_before_it() -> None:
    answer = "def f(x): return 0\nif f(1): \\"
    assert _run(f"{answer}\n{_TEST}\n").is_passed
    found = _run(f"{whole_lines(answer)}\n{_TEST}\n")
    assert not found.is_passed
    assert "SyntaxError" in found.reason or "IndentationError" in found.reason
    assert whole_lines("x = 1") == "x = 1"


@pytest.mark.parametrize(
    "fine",
    [
        "import sys\nsys.settrace(None)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "import threading\nthreading.Thread(target=f, args=(1,)).start()",
        "import atexit\natexit.register(print, 'bye')",
        "import os\nif os.fork():\n    os.wait()",
        "import doctest\nassert doctest.testmod() == (0, 1)",
    ],
)
def test_programs_that_pass_their_tests_pass(fine: str) -> None:
    found = _run(f'def f(x):\n    """Same.\n\n    >>> f(2)\n    2\n    """\n    return x\n{fine}\n{_TEST}\n')
    assert found.reason == "passed"
