"""This code against the official implementations, and the judge against itself: it must be able to fail."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfseen.tools import conformance
from halfseen.tools.golden import ATOL, RTOL, Case, Check, Family

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))


@pytest.mark.parametrize("case", CASES)
def test_our_code_gives_what_the_official_code_gave(case):
    verdict = conformance.judge(GOLDEN / f"{case}.json", conformance.families())
    assert verdict.passed, conformance.table(verdict)


@pytest.mark.parametrize("case", ["mae_pretrain_a", "mae_finetune_b_gap", "deit_v2_b_parallel_ls_hmlp"])
def test_the_slips_the_cases_warn_of_are_noticed(case, tmp_path, monkeypatch):
    """Another epsilon of LayerNorm, and the tanh form of GELU."""
    for path in GOLDEN.glob(f"{case}.*"):
        shutil.copy(path, tmp_path)
    path = tmp_path / f"{case}.json"
    right = path.read_text()
    path.write_text(right.replace("eps=1e-6", "eps=1e-5"))
    assert not conformance.judge(path, conformance.families()).passed
    path.write_text(right)
    assert conformance.judge(path, conformance.families()).passed
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x: gelu(x, approximate="tanh"))
    assert not conformance.judge(path, conformance.families()).passed


def test_every_family_has_a_case_here():
    prefixes = {family.prefix for family in conformance.families()}
    assert {prefix for prefix in prefixes if any(case.startswith(prefix) for case in CASES)} == prefixes


@pytest.fixture
def folder(tmp_path):
    """One case that may be spoilt."""
    for path in GOLDEN.glob("mae_finetune_a_cls.*"):
        shutil.copy(path, tmp_path)
    return tmp_path


def spoil(folder, change):
    """Rewrite the tensors of the folder's case."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def run(folder, capsys, *options):
    code = conformance.main([str(folder), *options])
    return code, capsys.readouterr().out


def test_a_good_folder_exits_with_0(folder, capsys):
    code, printed = run(folder, capsys)
    assert code == 0
    assert "1 of 1 cases passed" in printed


@pytest.mark.parametrize("name", ["out/logits", "out/loss_soft", "out/grad/cls_token"])
def test_one_number_that_is_off_fails_its_tensor(folder, capsys, name):
    def change(tensors):
        value = tensors[name].flatten()
        value[0] += 5e-4 * tensors[name].abs().max()
        tensors[name] = value.reshape(tensors[name].shape)

    spoil(folder, change)
    code, printed = run(folder, capsys)
    assert code == 1
    (line,) = [line for line in printed.splitlines() if line.endswith("FAIL")]
    assert name in line


def test_an_output_that_nobody_compares_fails(folder, capsys):
    spoil(folder, lambda tensors: tensors.update({"out/attention": torch.zeros(1)}))
    code, printed = run(folder, capsys)
    assert code == 1
    assert "FAIL out/attention was not compared" in printed


def test_a_weight_that_our_student_does_not_have_fails(folder, capsys):
    spoil(folder, lambda tensors: tensors.update({"state/blocks.0.extra": torch.zeros(1)}))
    code, printed = run(folder, capsys)
    assert code == 1
    assert "encoder.blocks.0.extra" in printed


def test_an_option_that_is_on_and_unknown_fails(folder, capsys):
    path = folder / "mae_finetune_a_cls.json"
    meta = json.loads(path.read_text())
    meta["config"]["attention_temperature"] = 2.0
    path.write_text(json.dumps(meta))
    code, printed = run(folder, capsys)
    assert code == 1
    assert "attention_temperature" in printed


def test_a_family_nobody_knows_fails_and_does_not_stop_the_others(folder, capsys):
    (folder / "aaa_unheard_of.json").write_text(json.dumps({"config": {}}))
    code, printed = run(folder, capsys)
    assert code == 1
    assert "no family of cases is called like this" in printed
    assert "1 of 2 cases passed" in printed


def test_a_familiar_name_from_other_code_fails(folder, capsys):
    path = folder / "mae_finetune_a_cls.json"
    meta = json.loads(path.read_text())
    meta["path"] = "models_other.py"
    path.write_text(json.dumps(meta))
    code, printed = run(folder, capsys)
    assert code == 1
    assert "models_other.py" in printed


def test_only_chooses_cases_and_json_holds_every_number(folder, capsys, tmp_path):
    (folder / "aaa_unheard_of.json").write_text(json.dumps({"config": {}}))
    code, _ = run(folder, capsys, "--only", "mae_*", "--json", str(tmp_path / "report.out"))
    assert code == 0
    (entry,) = json.loads((tmp_path / "report.out").read_text())
    assert entry["case"] == "mae_finetune_a_cls"
    assert entry["passed"] is True
    expected = {name for name in load_file(folder / "mae_finetune_a_cls.safetensors") if name.startswith("out/")}
    assert {check["name"] for check in entry["checks"]} == expected


def test_an_empty_choice_is_a_failure(folder, capsys):
    assert conformance.main([str(folder), "--only", "nothing*"]) == 1


def check(actual, expected, **tolerance):
    return Check("x", torch.tensor(actual), torch.tensor(expected), **tolerance)


def test_a_check_passes_within_both_tolerances_and_never_for_nan_or_another_shape():
    assert check([1.0, 0.0], [1.0 + RTOL / 2, ATOL / 2]).passed
    assert not check([1.0], [1.0 + 2 * (RTOL + ATOL)]).passed
    assert not check([float("nan")], [float("nan")]).passed
    assert not check([1.0, 1.0], [1.0]).passed
    assert not check([1], [2], rtol=0.0, atol=0.0).passed


def test_a_case_without_a_single_comparison_does_not_pass(tmp_path):
    (tmp_path / "x_a.json").write_text(json.dumps({"repo": "r", "path": "p", "config": {}}))
    empty = Family("x", "r", "p", lambda case: [])
    assert not conformance.judge(tmp_path / "x_a.json", [empty]).passed


def test_a_named_reason_excuses_an_output_and_is_shown(tmp_path):
    (tmp_path / "x_a.json").write_text(json.dumps({"repo": "r", "path": "p", "config": {}}))
    save_file({"out/a": torch.ones(1), "out/b": torch.ones(1)}, tmp_path / "x_a.safetensors")

    def compare(case: Case) -> list[Check]:
        return [Check("out/a", torch.ones(1), case.outputs["a"])]

    verdict = conformance.judge(tmp_path / "x_a.json", [Family("x", "r", "p", compare, {"b": "a says it all"})])
    assert verdict.passed
    assert "out/b: not compared, a says it all" in conformance.table(verdict)
