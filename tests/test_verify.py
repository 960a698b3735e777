"""How a client's numbers are judged, with clients made up here; and, where real ones are given, that exports pass."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import LINEARS, Run, client_python, llama, make_run, windows
from torch import Tensor

import lowbit
from lowbit.cli import main
from lowbit.formats import base
from lowbit.formats import compressed_tensors as ct
from lowbit.formats.files import read_shard, write_shard
from lowbit.numerics.spec import Int, per_channel, per_group, per_token
from lowbit.runtime import clients, imitate
from lowbit.runtime.clients import Client
from lowbit.runtime.imitate import linears, without_inputs
from lowbit.runtime.planned import planned
from lowbit.runtime.verify import EXACT, verify

W4 = per_group(Int(4), 32)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", llama(initializer_range=0.3), {LINEARS: W4})


@torch.no_grad()
def logits(model: Any, batch: Tensor) -> Tensor:
    return torch.cat([model(input_ids=window[None]).logits for window in batch])


class Pretender:
    """A client that answers what it is told to."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.monkeypatch = monkeypatch

    def answers(self, *, exact: bool = False, found: Any = None, **arrays: Tensor) -> None:
        lines = ["import json, pathlib, shutil, sys", "job = pathlib.Path(sys.argv[1])"]
        lines += ["asked = json.loads((job / 'job.json').read_text())", "assert asked['threads'] == 1"]
        for name, array in arrays.items():
            np.save(self.directory / f"{name}.npy", array.numpy())
            lines.append(f"shutil.copy({str(self.directory / name)!r} + '.npy', job / '{name}.npy')")
        said = {"client": "pretender", "version": "1.0", **(found or {})}
        lines.append(f"(job / 'found.json').write_text({json.dumps(said)!r})")
        self.says("\n".join(lines), exact=exact)

    def says(self, program: str, *, exact: bool = False) -> None:
        (self.directory / "pretender.py").write_text(program, "utf8")
        script = self.directory / "pretender.py"
        made = type("Pretended", (Client,), {"script": property(lambda _: script)})
        client = made("pretender", "json", "pip install pretender", exact=exact)
        self.monkeypatch.setitem(clients.CLIENTS, "pretender", client)


@pytest.fixture
def pretender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretender:
    return Pretender(tmp_path, monkeypatch)


def test_equal_logits_are_verified_and_others_are_not(run: Run, pretender: Pretender) -> None:
    expected = logits(run.reference, windows())
    pretender.answers(logits=expected, exact=True)
    found = verify("pretender", run.path, run.reference, windows())
    assert found.passed, found.message
    assert (found.max_logit_difference, found.top1, found.version) == (0.0, 1.0, "1.0")
    assert found.message.startswith("verified: largest logit difference 0 ")
    moved = expected.clone()
    moved[0, 3, 5] += 3e-5 * max(1.0, float(expected.abs().max()))
    pretender.answers(logits=moved, exact=True)
    found = verify("pretender", run.path, run.reference, windows())
    assert not found.passed
    assert found.message.startswith("failed: largest logit difference 0.0002")


def test_a_client_that_computes_in_16_bits_is_held_to_a_divergence(run: Run, pretender: Pretender) -> None:
    expected = logits(run.reference, windows())
    near = expected + 1e-3 * torch.randn_like(expected)
    pretender.answers(logits=near, exact=True, found={"dtype": "float16"})
    found = verify("pretender", run.path, run.reference, windows())
    assert found.passed, found.message
    assert found.kl is not None
    assert 0 < found.kl < 1e-3
    pretender.answers(logits=expected + 0.5 * torch.randn_like(expected), exact=True, found={"dtype": "float16"})
    found = verify("pretender", run.path, run.reference, windows())
    assert not found.passed
    assert "KL" in found.message


def test_kl_is_the_formula(run: Run, pretender: Pretender) -> None:
    expected = logits(run.reference, windows())
    other = expected + 0.3 * torch.randn_like(expected)
    pretender.answers(logits=other)
    found = verify("pretender", run.path, run.reference, windows())
    p, q = expected.double().softmax(-1), other.double().softmax(-1)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)


def test_scores_are_held_to_their_mean_and_spread(run: Run, pretender: Pretender) -> None:
    batch = windows()
    p = logits(run.reference, batch).log_softmax(-1)
    scores = torch.tensor(
        [[float(p[n, t, batch[n, t + 1]]) for t in range(batch.shape[1] - 1)] for n in range(len(batch))]
    )
    noise = 0.02 * torch.randn_like(scores)
    pretender.answers(scores=scores + noise)
    found = verify("pretender", run.path, run.reference, batch)
    assert found.passed, found.message
    assert found.score_difference == pytest.approx(float(noise.mean()), abs=1e-5)
    assert found.score_spread == pytest.approx(float(noise.std()), abs=1e-5)
    assert found.max_logit_difference is None
    for wrong in (scores + 0.05, scores + 0.5 * torch.randn_like(scores)):
        pretender.answers(scores=wrong)
        found = verify("pretender", run.path, run.reference, batch)
        assert not found.passed
        assert found.message.startswith("failed: mean difference of log-probabilities")


def test_perplexities_are_the_formula(run: Run, pretender: Pretender) -> None:
    batch = windows()
    expected = logits(run.reference, batch)
    other = expected + 0.3 * torch.randn_like(expected)
    p, q = (x.double().softmax(-1) for x in (expected, other))
    places = [(n, t) for n in range(batch.shape[0]) for t in range(batch.shape[1] - 1)]
    ours, theirs = (math.exp(-sum(math.log(x[n, t, batch[n, t + 1]]) for n, t in places) / len(places)) for x in (p, q))
    pretender.answers(logits=other)
    found = verify("pretender", run.path, run.reference, batch)
    assert (found.perplexity, found.client_perplexity) == (pytest.approx(ours), pytest.approx(theirs))
    pretender.answers(scores=q[:, :-1].log().gather(-1, batch[:, 1:, None])[..., 0].float())
    found = verify("pretender", run.path, run.reference, batch)
    assert (found.perplexity, found.client_perplexity) == (pytest.approx(ours), pytest.approx(theirs))


@pytest.fixture
def w8a8(tmp_path: Path) -> Run:
    """A run whose linears quantize their inputs."""
    run = make_run(tmp_path / "w8a8", llama(initializer_range=0.3), {LINEARS: per_channel(Int(8), scale="float32")})
    for module in linears(run.reference).values():
        module.layer = replace(module.layer, activation=per_token(Int(8)))
    return run


def test_quantized_inputs_are_never_exact(w8a8: Run, pretender: Pretender) -> None:
    expected = logits(w8a8.reference, windows())
    pretender.answers(logits=expected + 1e-4 * torch.randn_like(expected), exact=True)
    assert verify("pretender", w8a8.path, w8a8.reference, windows()).passed


SAME: dict[str, Any] = {"unequal": {"q": 0}, "flat": []}


def test_with_16_bit_inputs_a_client_that_shows_its_linears_has_to_be_exact(w8a8: Run, pretender: Pretender) -> None:
    expected = logits(w8a8.reference, windows())
    with without_inputs(linears(w8a8.reference)):
        plain = logits(w8a8.reference, windows())
    assert not torch.equal(plain, expected)
    assert torch.equal(logits(w8a8.reference, windows()), expected)
    pretender.answers(logits=expected, unquantized=plain, found=SAME)
    found = verify("pretender", w8a8.path, w8a8.reference, windows())
    assert found.passed, found.message
    assert (found.unquantized_difference, found.own_kl) == (0.0, None)
    pretender.answers(logits=expected, unquantized=expected, found=SAME)
    found = verify("pretender", w8a8.path, w8a8.reference, windows())
    assert not found.passed
    assert "failed: equal codes on equal inputs, but logits from 16-bit inputs differ" in found.message
    pretender.answers(logits=expected, unquantized=plain, found={"unequal": {"q": 3}, "flat": []})
    found = verify("pretender", w8a8.path, w8a8.reference, windows())
    assert not found.passed
    assert "failed: inputs get other codes in 1 linears, the first q;" in found.message


def test_what_rounding_may_do_is_measured_on_our_own_model(
    w8a8: Run, pretender: Pretender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client as far away as our model is from itself passes, one a few times as far does not."""
    monkeypatch.setattr(imitate, "NUDGE", 0.1)
    expected = logits(w8a8.reference, windows())
    with without_inputs(linears(w8a8.reference)):
        plain = logits(w8a8.reference, windows())
    with imitate.nudged(w8a8.reference):
        moved = logits(w8a8.reference, windows())
    pretender.answers(logits=moved, unquantized=plain, found=SAME)
    found = verify("pretender", w8a8.path, w8a8.reference, windows())
    assert found.passed, found.message
    assert found.own_kl is not None
    assert found.own_kl > 1e-3
    assert found.kl == pytest.approx(found.own_kl)
    pretender.answers(logits=expected + 2 * (moved - expected), unquantized=plain, found=SAME)
    found = verify("pretender", w8a8.path, w8a8.reference, windows())
    assert not found.passed
    assert "where rounding alone carries lowbit's own model to KL" in found.message


def test_a_client_that_rounds_inputs_may_be_as_far_away_as_rounding_carries(
    run: Run, pretender: Pretender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imitate, "NUDGE", 0.1)
    expected = logits(run.reference, windows())
    with imitate.nudged(run.reference):
        moved = logits(run.reference, windows())
    for there, rounds, passed in ((moved, True, True), (moved, False, False), (3 * moved - 2 * expected, True, False)):
        pretender.answers(logits=there)
        monkeypatch.setitem(clients.CLIENTS, "pretender", replace(clients.CLIENTS["pretender"], rounds=rounds))
        found = verify("pretender", run.path, run.reference, windows())
        assert found.kl is not None and found.kl > 1e-3
        assert found.passed is passed, found.message
        assert ("where rounding alone carries" in found.message) is rounds


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit('it cannot')", "not verified: pretender cannot run the export: it cannot"),
        ("import os; os.kill(os.getpid(), 9)", "not verified: the client was killed by signal 9"),
        ("import sys; sys.exit(1)", "cannot run the export: it said nothing"),
        (
            "raise SystemExit('Value error, none [type=value_error]\\n  For further information visit value_error')",
            f"cannot run the export: none (in {sys.executable}, see LOWBIT_PRETENDER_PYTHON)",
        ),
        (
            "raise SystemExit('[rank0]: [rank0]: ValueError: no kernel. Reasons: \\n[rank0]: it needs AMX.\\nbye')",
            f"cannot run the export: ValueError: no kernel. Reasons: it needs AMX. (in {sys.executable}, see",
        ),
    ],
)
def test_a_client_that_produces_nothing(run: Run, pretender: Pretender, program: str, message: str) -> None:
    pretender.says(program)
    found = verify("pretender", run.path, run.reference, windows())
    assert not found.passed
    assert message in found.message


def test_logits_of_another_shape_and_tensors_that_did_not_load(run: Run, pretender: Pretender) -> None:
    pretender.answers(logits=torch.zeros(2, 24, 97))
    found = verify("pretender", run.path, run.reference, windows())
    assert not found.passed
    assert "logits of shape [2, 24, 97] instead of [2, 24, 96]" in found.message
    pretender.answers(logits=torch.zeros(2, 24, 96), found={"problems": ["a.weight is missing"]})
    found = verify("pretender", run.path, run.reference, windows())
    assert not found.passed
    assert "1 tensors did not load as written, the first: a.weight is missing" in found.message


def test_experts_that_transformers_has_no_place_for_are_no_fault_of_the_export(
    run: Run, pretender: Pretender, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = ["a.experts.down_proj is missing", "a.experts.0.w2.qweight is unexpected"]
    for problems, said in (
        (lost, "not verified: transformers 5 has a mixture's experts as one parameter"),
        ([*lost, "a.q_proj.qweight is unexpected"], "failed: 3 tensors did not load as written"),
    ):
        pretender.answers(found={"version": "5.24.0 with gptqmodel 7.6.0", "problems": problems})
        made = replace(clients.CLIENTS["pretender"], name="transformers")
        monkeypatch.setitem(clients.CLIENTS, "transformers", made)
        found = verify("transformers", run.path, run.reference, windows())
        assert not found.passed
        assert found.message.startswith(said)


def test_clients_write_their_logs_elsewhere(run: Run, pretender: Pretender, tmp_path: Path) -> None:
    pretender.says(f"import os; open({str(tmp_path / 'place')!r}, 'w').write(os.getcwd()); raise SystemExit('done')")
    verify("pretender", run.path, run.reference, windows())
    assert "lowbit-verify-" in (tmp_path / "place").read_text("utf8")


# --- which client -----------------------------------------------------------------------------------------------------


def test_a_client_that_is_not_installed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(clients.CLIENTS, "vllm", Client("vllm", "no_such_module", "pip install vllm"))
    monkeypatch.delenv("LOWBIT_VLLM_PYTHON", raising=False)
    found = verify("vllm", run.path, run.reference, windows())
    assert not found.passed
    assert found.message.startswith(f"not verified: vllm is not installed in {sys.executable}: pip install vllm")
    assert "LOWBIT_VLLM_PYTHON" in found.message
    monkeypatch.setenv("LOWBIT_VLLM_PYTHON", str(tmp_path / "python"))
    assert "which does not run" in verify("vllm", run.path, run.reference, windows()).message
    monkeypatch.delenv("LOWBIT_VLLM_PYTHON")
    demo = lowbit.quantize("demo", "rtn-w4a16-g32", tmp_path / "demo").path
    capsys.readouterr()
    asked = ["export", str(demo), "--format", "gptq", "--output", str(tmp_path / "out"), "--verify=vllm"]
    assert main([*asked, "--json", str(tmp_path / "found.json")]) == 1
    assert "not verified: vllm is not installed" in capsys.readouterr().out
    assert (tmp_path / "out" / "config.json").is_file()
    found_json = json.loads((tmp_path / "found.json").read_text("utf8"))
    assert found_json["verification"]["passed"] is False


def test_a_client_that_nobody_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = lowbit.quantize("demo", "rtn-w4a16-g32", tmp_path / "demo").path
    asked = ["export", str(demo), "--format", "gptq", "--output", str(tmp_path / "out"), "--verify=vlm"]
    assert main(asked) == 2
    assert "did you mean vllm?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- what the files weigh ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "recipe"),
    [
        ("compressed-tensors", "rtn-w4a16-g128"),
        ("compressed-tensors", "rtn-w8a8"),
        ("compressed-tensors", "rtn-nvfp4a16"),
        ("gptq", "rtn-w4a16-g128"),
        ("gptq", "rtn-w3a16-g32-asym"),
        ("awq", "rtn-w4a16-g64-asym"),
        ("gguf", "rtn-w4a16-g32"),
        ("gguf", "rtn-w4a16-g128"),
        ("gguf", "rtn-w8a16"),
        ("gguf", "rtn-w3a16-g32"),
        ("mlx", "rtn-w4a16-g64"),
        ("mlx", "rtn-w4a16-g64-asym"),
        ("bitsandbytes", "rtn-nf4-g64"),
        ("bitsandbytes", "rtn-nf4-g64-double"),
        ("modelopt", "rtn-fp8"),
    ],
)
def test_exports_weigh_what_was_planned(form: str, recipe: str, tmp_path: Path) -> None:
    options = {"samples": 2, "length": 64} if recipe.endswith("static") else {}
    run = lowbit.quantize("demo", recipe, tmp_path / "run", **options).path
    lowbit.export(run, tmp_path / "out", format=form)
    plan = planned(run, base.find(form))
    stored = plan.measure(tmp_path / "out")
    assert plan.least <= stored <= plan.most
    assert stored == pytest.approx(plan.total, rel=0.06)
    assert plan.most < 1.2 * plan.total, "a bound that catches nothing"


def test_a_weight_too_much_or_too_little_fails(run: Run, pretender: Pretender, tmp_path: Path) -> None:
    ct.export_directory(run.path, tmp_path / "out", run.skeleton)
    pretender.answers(logits=logits(run.reference, windows()), exact=True)
    plan = planned(run.path, base.find("compressed-tensors"))
    found = verify("pretender", tmp_path / "out", run.reference, windows(), planned=plan)
    assert found.passed, found.message
    assert found.planned_bytes == plan.total
    file = tmp_path / "out" / "model-00002-of-00002.safetensors"
    tensors = read_shard(file)
    name = "model.layers.0.mlp.gate_proj.weight"
    spare = {f"spare.{index}": torch.zeros(160, 64, dtype=torch.bfloat16) for index in range(3)}
    for changed in ({**tensors, **spare}, {k: v for k, v in tensors.items() if not k.endswith("packed")}):
        write_shard(file, changed)
        found = verify("pretender", tmp_path / "out", run.reference, windows(), planned=plan)
        assert not found.passed
        assert "which is not what codes and scales take" in found.message
    assert name not in tensors


# --- real clients -----------------------------------------------------------------------------------------------------

PAIRS = [
    ("compressed-tensors", "vllm", "rtn-w8a8"),
    ("gptq", "gptqmodel", "rtn-w4a16-g128-asym"),
    ("gptq", "transformers", "rtn-w4a16-g128"),
    ("gptq", "vllm", "rtn-w4a16-g128"),
    ("awq", "gptqmodel", "rtn-w4a16-g128-asym"),
    ("awq", "transformers", "rtn-w4a16-g128-asym"),
    ("awq", "vllm", "rtn-w4a16-g128-asym"),
    ("gguf", "llamacpp", "rtn-w4a16-g32"),
    ("mlx", "mlx", "rtn-w4a16-g64"),
    ("bitsandbytes", "bitsandbytes", "rtn-nf4-g64"),
]


@pytest.mark.client
@pytest.mark.parametrize(("form", "client", "recipe"), PAIRS)
def test_the_command_line_verifies_in_the_real_client(
    form: str,
    client: str,
    recipe: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if client == "transformers":  # it reads these formats with the help of GPTQModel
        monkeypatch.setenv("LOWBIT_TRANSFORMERS_PYTHON", client_python("gptqmodel"))
    client_python(client)
    run = lowbit.quantize("demo", recipe, tmp_path / "run").path
    asked = ["export", str(run), "--format", form, "--output", str(tmp_path / "out"), f"--verify={client}"]
    status = main([*asked, "--json", str(tmp_path / "found.json")])
    said = capsys.readouterr().out
    assert status == 0, said
    found = json.loads((tmp_path / "found.json").read_text("utf8"))["verification"]
    assert found["passed"] is True
    assert found["client"] == client
    assert found["stored_bytes"] > 0
    assert found["client_perplexity"] == pytest.approx(found["perplexity"], rel=0.02)
    if client == "vllm":
        assert found["score_spread"] < (0.25 if recipe == "rtn-w8a8" else 0.1)
    elif (form, client) == ("gptq", "transformers"):
        assert found["max_logit_difference"] <= EXACT * found["largest_logit"]
    else:
        assert found["top1"] > 0.95
