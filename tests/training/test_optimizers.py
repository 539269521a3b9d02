"""Optimizers against torch's own and against closed forms; state that comes back; masters that do not lose updates."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kajiya.config.schema import OptimConfig, ScheduleConfig
from kajiya.config.tables import TABLES
from kajiya.errors import ConfigError, StoreError
from kajiya.training.muon import Muon, orthogonalize
from kajiya.training.optimizers import inputs_first, load_optimizer, parameter_roles, require_other_memory
from kajiya.training.rounding_adamw import RoundingAdamW, norm_of
from kajiya.training.schedules import load_schedule

NAMES = sorted(TABLES["optimizer"])
Make = Callable[..., torch.nn.Module]


def _set_grads(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_adamw_equals_torch(tiny_model: Make) -> None:
    ours, theirs = tiny_model(), tiny_model()
    optimizer = load_optimizer(OptimConfig(name="adamw", lr=1e-2, weight_decay=0.1), ours)
    embedding = {id(theirs.get_input_embeddings().weight)}  # type: ignore[operator,union-attr]
    decayed = [p for p in theirs.parameters() if p.ndim == 2 and id(p) not in embedding]
    plain = [p for p in theirs.parameters() if p.ndim != 2 or id(p) in embedding]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step in range(4):
        _set_grads(ours, step)
        _set_grads(theirs, step)
        for group in reference.param_groups:
            group["lr"] = 1e-2 * (0.5**step)
        optimizer.step(1e-2 * (0.5**step))
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("grads", ["the weights' own", "added up"])
@pytest.mark.parametrize("options", [{}, {"beta1": 0.7, "beta2": 0.99, "eps": 1e-3}])
def test_adamw_of_bf16_weights_is_torchs_over_float32_masters(grads: str, options: dict[str, float]) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(37, 40), torch.nn.LayerNorm(40), torch.nn.Linear(40, 501)).bfloat16()
    model[1].weight.requires_grad_(False)
    optimizer = load_optimizer(OptimConfig(name="adamw", lr=1e-2, weight_decay=0.1, options=options), model)
    assert isinstance(optimizer.optimizers[0], RoundingAdamW)
    expected = {name: master.clone() for name, master in optimizer.masters.items()}
    betas, eps = (options.get("beta1", 0.9), options.get("beta2", 0.95)), options.get("eps", 1e-8)
    matrices = [tensor for tensor in expected.values() if tensor.ndim == 2]
    vectors = [tensor for tensor in expected.values() if tensor.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=betas, eps=eps)
    for step in range(6):
        for part in range(2 if grads == "added up" else 1):
            _set_grads(model, 10 * step + part)
            for name, parameter in optimizer.parameters.items():
                if name == "2.bias" and step == 3:  # no gradient: neither its moments nor its count move
                    parameter.grad = expected[name].grad = None
                    continue
                own, grad = expected[name].grad, parameter.grad.float()  # type: ignore[union-attr]
                expected[name].grad = grad if part == 0 or own is None else own + grad
            if grads == "added up":
                optimizer.add_up()
        optimizer.step(1e-2)
        reference.step()
        for name, master in optimizer.masters.items():
            torch.testing.assert_close(master, expected[name], rtol=1e-6, atol=1e-7)
            assert torch.equal(optimizer.parameters[name], master.bfloat16())
            assert optimizer.parameters[name].grad is master.grad is None


def test_the_norm_of_a_gradient_is_that_of_all_its_tensors() -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        grads = [torch.randn(shape).to(dtype) for shape in ((3, 1), (40, 1000), (16, 16), (1, 1))]
        exact = torch.cat([grad.double().flatten() for grad in grads]).norm()
        torch.testing.assert_close(norm_of(grads), exact.float(), rtol=1e-6, atol=0)
        turned = [grad.T for grad in grads]  # not laid one element after the other
        torch.testing.assert_close(norm_of(turned), exact.float(), rtol=1e-5, atol=0)
    assert norm_of([torch.tensor([1.0, torch.inf])]).isinf()
    assert norm_of([torch.tensor([1.0, torch.nan], dtype=torch.bfloat16)]).isnan()


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 40), (2, 40, 16), (1, 64, 64)])
def test_orthogonalize_is_near_the_polar_factor(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    result = orthogonalize(matrices, 5, torch.float32)
    singular = torch.linalg.svdvals(result)
    assert float(singular.max()) < 1.2
    if shape[1] != shape[2]:  # a random square matrix has a singular value near 0, which five iterations do not lift
        assert float(singular.min()) > 0.8
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    cosine = (result * (left @ right)).sum() / (result.norm() * (left @ right).norm())
    assert float(cosine) > 0.98


def test_muon_equals_its_formula_one_matrix_at_a_time() -> None:
    """Momentum, Nesterov, polar factor by SVD, scale and decay, each written out; torch's own Muon moves the same way."""
    torch.manual_seed(0)
    start = [torch.randn(12, 30), torch.randn(30, 12), torch.randn(12, 30)]
    ours = [torch.nn.Parameter(each.clone()) for each in start]
    theirs = [torch.nn.Parameter(each.clone()) for each in start]
    mine = Muon(ours, lr=0.02, weight_decay=0.1, dtype=torch.float32)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True)
    expected = [each.clone() for each in start]
    momenta = [torch.zeros_like(each) for each in start]
    for step in range(3):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(10 * step + index))
            b.grad = a.grad.clone()
            momenta[index] = 0.95 * momenta[index] + 0.05 * a.grad
            left, _, right = torch.linalg.svd(0.05 * a.grad + 0.95 * momenta[index], full_matrices=False)
            rows, columns = a.shape
            expected[index] = expected[index] * (1 - 0.02 * 0.1) - 0.02 * max(1, rows / columns) ** 0.5 * (left @ right)
        mine.step()
        reference.step()
    for a, b, formula, before in zip(ours, theirs, expected, start, strict=True):
        moved, a, b = (formula - before).norm(), a.detach(), b.detach()
        assert float((a - formula).norm() / moved) < 0.1
        assert float((a - b).norm() / moved) < 0.35  # torch's polynomial leaves singular values from 0.7 to 1.2


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_more_iterations_end_at_the_polar_factor(dtype: torch.dtype, error: float) -> None:
    """Singular values go to 1, not to the 1.03 of a fifth polynomial that is repeated; in bf16 none runs away."""
    torch.manual_seed(0)
    matrices = torch.randn(3, 40, 24)
    for n_steps in (8, 12, 40):
        singular = torch.linalg.svdvals(orthogonalize(matrices, n_steps, dtype).float())
        assert float((singular - 1).abs().max()) < error
    assert float(torch.linalg.svdvals(orthogonalize(matrices, 5, dtype).float()).max()) < 1.2


def test_muons_scale_goes_by_outputs_over_inputs_whichever_comes_first() -> None:
    """A GPT-2's matrices are [inputs, outputs]: an update is the transpose of that of a linear layer of the same sizes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    assert {name.split(".", 3)[3] for name in inputs_first(model)} == {
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
    }  # fmt: skip
    mlp = model.transformer.h[0].mlp
    linear = torch.nn.Sequential(torch.nn.Linear(16, 64, bias=False), torch.nn.Linear(64, 16, bias=False))
    matrices = [(mlp.c_fc.weight, linear[0].weight), (mlp.c_proj.weight, linear[1].weight)]
    with torch.no_grad():
        for turned, straight in matrices:
            straight.copy_(turned.T)
    optimizers = [load_optimizer(OptimConfig(name="muon", lr=0.1), each) for each in (model, linear)]
    for turned, straight in matrices:
        turned.grad = torch.randn(turned.shape)
        straight.grad = turned.grad.T.clone()
    before = mlp.c_fc.weight.detach().clone()
    for optimizer in optimizers:
        optimizer.step(0.1)
    for turned, straight in matrices:
        torch.testing.assert_close(turned.detach().T, straight.detach(), rtol=1e-4, atol=1e-5)
    # √(64 / 16) = 2 times the rate, times a polar factor whose 16 singular values are 1.
    decayed = before * (1 - 0.1 * OptimConfig().weight_decay)
    assert float((mlp.c_fc.weight.detach() - decayed).norm()) == pytest.approx(0.1 * 2 * 4, rel=0.05)


def test_muon_takes_a_stack_of_experts_as_its_matrices() -> None:
    torch.manual_seed(0)
    stacks = [torch.nn.Parameter(torch.randn(3, 12, 30)) for _ in range(2)]
    alone = [torch.nn.Parameter(each.detach().clone()) for stack in stacks for each in stack]
    optimizers = [Muon(stacks, lr=0.1, weight_decay=0.1), Muon(alone, lr=0.1, weight_decay=0.1)]
    for stack in stacks:
        stack.grad = torch.randn(stack.shape)
    for parameter, grad in zip(
        alone, [each for stack in stacks if stack.grad is not None for each in stack.grad], strict=True
    ):
        parameter.grad = grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(
        torch.cat([each.detach() for each in stacks]), torch.stack([each.detach() for each in alone])
    )


def test_experts_that_have_their_inputs_first_are_known() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    sizes |= {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 64,
    }
    found = inputs_first(GptOssForCausalLM(GptOssConfig(**sizes)))
    assert {name.rpartition(".")[2] for name in found} >= {"gate_up_proj", "down_proj"}
    assert not inputs_first(MixtralForCausalLM(MixtralConfig(**sizes)))


def test_adafactors_rate_is_told_as_it_is_applied(tiny_model: Make) -> None:
    """Held under 1/√t; another optimizer applies what it is given."""
    rates = {}
    for name in ("adafactor", "adamw"):
        model = tiny_model()
        optimizer = load_optimizer(OptimConfig(name=name, lr=0.6), model)
        rates[name] = [optimizer.applied_rate(0.6)]
        for step in range(5):
            _set_grads(model, step)
            optimizer.step(0.6)
            rates[name].append(optimizer.applied_rate(0.6))
    assert rates["adamw"] == [0.6] * 6
    assert rates["adafactor"] == pytest.approx([0.6, 0.6, 0.6, 3**-0.5, 4**-0.5, 5**-0.5])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_comes_back(name: str, dtype: torch.dtype, tiny_model: Make) -> None:
    first = tiny_model().to(dtype)
    optimizer = load_optimizer(OptimConfig(name=name), first)
    for step in range(3):
        _set_grads(first, step)
        optimizer.step(1e-2)
    state = {key: value.clone() for key, value in optimizer.state_tensors().items()}

    second = tiny_model(seed=5).to(dtype)
    restored = load_optimizer(OptimConfig(name=name), second)
    restored.load_state_tensors(state)
    for model, each in ((first, optimizer), (second, restored)):
        _set_grads(model, 9)
        each.step(1e-2)
    again = restored.state_tensors()
    assert again.keys() == state.keys()
    for key, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, again[key]), key
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_masters_do_not_lose_small_updates(name: str, tiny_model: Make) -> None:
    model = tiny_model().bfloat16()
    weight = model.model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr,index]
    optimizer = load_optimizer(OptimConfig(name=name, lr=1e-6, weight_decay=0.0), model)
    name_of = next(key for key, value in optimizer.parameters.items() if value is weight)
    before = optimizer.masters[name_of].clone()
    for _ in range(5):
        _set_grads(model, 3)
        optimizer.step(1e-6)
    assert optimizer.masters[name_of].dtype == torch.float32
    assert not torch.equal(optimizer.masters[name_of], before)
    assert torch.equal(weight, optimizer.masters[name_of].bfloat16())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_on_the_host_updates_as_one_on_the_device(name: str, dtype: torch.dtype, tiny_model: Make) -> None:
    """The mechanism, on a CPU that is both: masters apart from the parameters, and the same numbers; with an average."""
    models = [tiny_model().to(dtype) for _ in range(2)]
    optimizers = [
        load_optimizer(OptimConfig(name=name, offload=offload), model, ema_decay=0.9)
        for model, offload in zip(models, (False, True), strict=True)
    ]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            _set_grads(model, step)
            optimizer.step(1e-2)
    beside, apart = optimizers
    assert all(apart.masters[key].data_ptr() != p.data_ptr() for key, p in apart.parameters.items())
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)
    states = [optimizer.state_tensors() for optimizer in optimizers]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    with beside.averaged(), apart.averaged():
        for a, b in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(a, b)
    other = tiny_model(seed=7).to(dtype)
    restored = load_optimizer(OptimConfig(name=name, offload=True), other, ema_decay=0.9)
    restored.load_state_tensors({key: tensor.clone() for key, tensor in states[0].items()})
    for a, b in zip(models[0].parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("schedule", sorted(TABLES["schedule"]))
@pytest.mark.parametrize("name", NAMES)
def test_every_group_follows_every_schedule(name: str, schedule: str, tiny_model: Make) -> None:
    """The rate of each group is its own peak times the schedule's factor, at every step; the weights stay finite."""
    options = {"embedding_lr": 0.3, "adamw_lr": 0.1} if name == "muon" else {}
    model = tiny_model()
    optimizer = load_optimizer(OptimConfig(name=name, lr=1e-2, options=options), model)
    peaks = [[group["lr"] for group in each.param_groups] for each in optimizer.optimizers]
    assert {lr for each in peaks for lr in each} == ({0.3, 0.1, 1e-2} if name == "muon" else {1e-2})
    factor = load_schedule(ScheduleConfig(name=schedule, warmup_fraction=0.25), 8)
    for step in range(1, 9):
        _set_grads(model, step)
        optimizer.step(1e-2 * factor(step))
        rates = [[group["lr"] for group in each.param_groups] for each in optimizer.optimizers]
        assert rates == [[pytest.approx(peak * factor(step)) for peak in each] for each in peaks]
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_state_on_the_host_needs_a_device_beside_it() -> None:
    require_other_memory(OptimConfig(), torch.device("cpu"))
    require_other_memory(OptimConfig(offload=True), torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"optim\.offload.*this is cpu"):
        require_other_memory(OptimConfig(offload=True), torch.device("cpu"))


def test_a_state_of_other_parameters_is_refused(tiny_model: Make) -> None:
    optimizer = load_optimizer(OptimConfig(), tiny_model())
    state = optimizer.state_tensors()
    state["master/nobody.weight"] = torch.zeros(2)
    with pytest.raises(StoreError, match=r"nobody\.weight"):
        optimizer.load_state_tensors(state)


def test_a_model_without_trainable_parameters_is_refused(tiny_model: Make) -> None:
    model = tiny_model()
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        load_optimizer(OptimConfig(), model)


def test_the_experts_of_a_mixture_are_matrices_and_their_biases_vectors() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    roles = parameter_roles(GptOssForCausalLM(GptOssConfig(vocab_size=64, **sizes, **heads)))
    experts = {name.rpartition(".")[2]: role for name, role in roles.items() if ".experts." in name}
    assert experts == {
        "gate_up_proj": "matrix", "down_proj": "matrix", "gate_up_proj_bias": "vector", "down_proj_bias": "vector",
    }  # fmt: skip
    assert parameter_roles(torch.nn.Sequential(torch.nn.Conv1d(2, 3, 4)))["0.weight"] == "vector"


def test_a_head_decays_where_there_is_one(tiny_model: Make) -> None:
    config = OptimConfig(weight_decay=0.1, decayed=("matrix", "head"))
    with pytest.raises(ConfigError, match=r"optim\.decayed.*none of its own.*\n.*embedding"):
        load_optimizer(config, tiny_model(tied=True))
    groups = [
        group for each in load_optimizer(config, tiny_model(tied=False)).optimizers for group in each.param_groups
    ]
    decaying = {tuple(tensor.shape) for group in groups if group["weight_decay"] for tensor in group["params"]}
    assert (97, 32) in decaying
