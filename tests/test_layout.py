"""The rules of the layout: who imports whom, one wheel with one name, nothing of one machine in the files."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = ("pretrain", "finetune", "launch", "tools")
ENGINES = re.compile(r"\b(ddp|fsdp|fsdp2|deepspeed|fairscale)\b", re.IGNORECASE)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_library_imports_no_stage():
    for path in (ROOT / "halfseen").rglob("*.py"):
        for stage in STAGES:
            bad = [name for name in imports(path) if name.startswith(f"halfseen.{stage}")]
            assert not bad, f"{path} imports {bad}"


def test_pretrain_and_finetune_do_not_import_each_other():
    for here, there in (("pretrain", "finetune"), ("finetune", "pretrain")):
        for path in (ROOT / here).rglob("*.py"):
            assert not [name for name in imports(path) if name.startswith(f"halfseen.{there}")], path


def names_in_code(tree: ast.AST) -> set[str]:
    """Identifiers and whole string constants of a module, docstrings left out."""
    nodes = list(ast.walk(tree))
    return (
        {node.id for node in nodes if isinstance(node, ast.Name)}
        | {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        | {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    )


def test_no_file_outside_engines_names_an_engine_in_code():
    """Names may stand in config (where the user chooses) and in texts; code elsewhere must not know engines."""
    assert [name for name in names_in_code(ast.parse('if engine.name == "fsdp": pass')) if ENGINES.fullmatch(name)]
    for folder in ("halfseen", "pretrain", "finetune", "launch", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            if "engines" in path.parts or path == ROOT / "halfseen/engine_config.py":
                continue
            found = [name for name in names_in_code(ast.parse(path.read_text())) if ENGINES.fullmatch(name)]
            assert not found, f"{path} names {found}"


def test_no_file_is_named_for_nothing():
    for path in ROOT.rglob("*.py"):
        if ".venv" not in path.parts:
            assert path.stem not in {"utils", "helpers", "misc", "common"}, path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "halfseen"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def test_the_wheel_owns_one_top_level_name_and_carries_recipes_and_images(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"halfseen"}
    assert any(name.endswith("configs/pretrain/mae_b16.yaml") for name in names)
    assert any("data/embedded/emoji/train-" in name for name in names)


def test_the_wheel_works_installed_in_an_empty_environment(wheel, tmp_path):
    """Its own code comes from the wheel; dependencies are borrowed from this environment, not downloaded again."""
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)],
        check=True,
    )
    import torch

    site = next(environment.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    for arguments in (["--help"], ["recipes"]):
        program = [str(environment / "bin" / "halfseen"), *arguments]
        result = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, check=True)
        assert "pretrain" in result.stdout
    where = subprocess.run(
        [str(python), "-c", "import halfseen; print(halfseen.__file__)"], capture_output=True, text=True, cwd=tmp_path
    )
    assert where.stdout.startswith(str(site))
