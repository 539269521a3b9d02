"""Deferred functions are the real ones, later; whatever else is asked of their modules is there at once."""

import json
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest

from kajiya.run.deferred import deferred


def _said(program: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(find_spec("scipy") is None, reason="SciPy is not installed")
def test_transformers_function_of_scipy_is_scipys_once_it_is_called() -> None:
    found = _said(
        """
        import json, sys
        from kajiya.run.process import import_transformers
        import_transformers()
        import transformers.loss.loss_for_object_detection as loss
        before = [name in sys.modules for name in ("scipy", "scipy.optimize", "torchao")]
        costs = [[4, 1, 3], [2, 0, 5], [3, 2, 2]]
        theirs = [each.tolist() for each in loss.linear_sum_assignment(costs, maximize=True)]
        import scipy.optimize
        real = [each.tolist() for each in scipy.optimize.linear_sum_assignment(costs, maximize=True)]
        print(json.dumps({"before": before, "theirs": theirs, "real": real, "file": scipy.optimize.__file__}))
        """
    )
    assert found["before"] == [False, False, False]
    assert found["theirs"] == found["real"]
    assert str(found["file"]).endswith("__init__.py")


def test_torchs_compiler_is_imported_when_something_is_compiled_and_learns_what_was_said_to_it() -> None:
    found = _said(
        """
        import json, sys
        from kajiya.run.deferred import compiler_deferred
        from kajiya.run.process import import_transformers
        import_transformers()
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
        model = LlamaForCausalLM(LlamaConfig(**sizes))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        model(torch.zeros(1, 4, dtype=torch.int64)).logits.sum().backward()

        def opaque(x):
            print(end="")  # nothing that a graph could hold
            return x + 1

        with compiler_deferred():
            import torch._dynamo
            allowed = torch._dynamo.allow_in_graph(opaque)

            @torch.compiler.disable
            def hidden(x):
                return x + 2

            @torch.compiler.disable(recursive=False)
            def hidden_too(x):
                return x + 3

            constant = torch._dynamo.assume_constant_result(lambda: 7)
        x = torch.zeros(2)
        answers = [float(each(x)[0]) for each in (allowed, hidden, hidden_too)]
        before = [name for name in sys.modules if name.startswith("torch._dynamo")]
        whole = torch.compile(lambda x: allowed(x) * constant(), backend="eager", fullgraph=True)
        answers.append(float(whole(x)[0]))
        refused = 0
        for each in (hidden, hidden_too):
            try:
                torch.compile(lambda x: each(x), backend="eager", fullgraph=True)(x)
            except torch._dynamo.exc.Unsupported:
                refused += 1
        answers += [float(torch.compile(lambda x: each(x), backend="eager")(x)[0]) for each in (hidden, hidden_too)]
        optimizer.add_param_group({"params": [torch.nn.Parameter(x)]})
        kept_out = type(optimizer).add_param_group.__wrapped__
        later = float(torch.compile(model, backend="eager")(torch.zeros(1, 4, dtype=torch.int64)).logits.sum())
        plain = float(model(torch.zeros(1, 4, dtype=torch.int64)).logits.sum())
        found = {"answers": answers, "before": before, "refused": refused, "same": abs(later - plain) < 1e-5}
        found["kept out"] = kept_out is not kept_out.__dynamo_disable
        found["finders"] = sum("_Marks" in str(each) for each in sys.meta_path)
        print(json.dumps(found))
        """
    )
    assert found["before"] == []
    assert found["answers"] == [1.0, 2.0, 3.0, 7.0, 2.0, 3.0]
    assert found["refused"] == 2
    assert found["kept out"]
    assert found["same"]
    assert found["finders"] == 0


def test_compiled_modules_run_as_they_are_written() -> None:
    found = _said(
        """
        import json, sys
        from kajiya.run.deferred import uncompiled
        from kajiya.run.process import import_transformers
        import_transformers()
        import torch
        made = []

        def backend(graph, inputs):
            made.append(graph)
            return graph.forward

        class Module(torch.nn.Module):
            def forward(self, x):
                return torch.relu(x) + 1

        module = Module()
        with uncompiled(), torch.no_grad():
            module(torch.zeros(1, 2))
        before = [name for name in sys.modules if name.startswith("torch._dynamo")]
        module.compile(backend=backend)
        with uncompiled():
            module(torch.zeros(1, 2))
        counts = [len(made)]
        module(torch.zeros(1, 2))
        print(json.dumps({"before": before, "counts": [*counts, len(made)]}))
        """
    )
    assert found == {"before": [], "counts": [0, 1]}


def test_a_name_that_is_not_deferred_and_a_later_import_get_the_real_module() -> None:
    sys.modules.pop("colorsys", None)
    with deferred({"colorsys": ("rgb_to_hsv",)}):
        from colorsys import rgb_to_hsv as early

        assert not hasattr(sys.modules["colorsys"], "__file__")
        from colorsys import hsv_to_rgb

        assert sys.modules["colorsys"].__file__
    import colorsys

    assert colorsys.hsv_to_rgb is hsv_to_rgb
    assert colorsys.rgb_to_hsv is not early
    assert early(0.2, 0.4, 0.4) == colorsys.rgb_to_hsv(0.2, 0.4, 0.4)
    with deferred({"colorsys": ("rgb_to_hsv",)}):  # it is in the process already
        assert sys.modules["colorsys"] is colorsys


def test_what_is_not_installed_stays_so() -> None:
    with deferred({"no_such_package.part": ("function",)}), pytest.raises(ModuleNotFoundError):
        import no_such_package.part  # noqa: F401
    sys.modules.pop("colorsys", None)
    with deferred({"colorsys": ("no_such_function",)}):
        from colorsys import no_such_function
    with pytest.raises(AttributeError, match="no_such_function"):
        no_such_function()
