"""``halfseen conformance FOLDER``: compare this code with what official implementations returned."""

import argparse
import fnmatch
import importlib
import json
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import halfseen.tools

from .golden import Case, Check, Family


@dataclass
class Verdict:
    """What came of one case."""

    case: str
    checks: list[Check] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # output that need not be compared -> why
    errors: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """At least one number compared, all within tolerance, nothing left out."""
        return bool(self.checks) and not self.errors and all(check.passed for check in self.checks)


def families() -> list[Family]:
    """The families of every ``golden_*.py`` beside this file."""
    found: list[Family] = []
    for module in pkgutil.iter_modules(halfseen.tools.__path__):
        if module.name.startswith("golden_"):
            found += importlib.import_module(f"halfseen.tools.{module.name}").FAMILIES
    return found


def family_of(case: Case, known: Sequence[Family]) -> Family:
    """The family with the longest prefix of the case's name; it must also be of the code the case is from.

    The name is the one the case states, else its file's. One that no family has is told by its code, if that can tell.
    """
    name, repo, path = case.meta.get("case", case.name), case.meta.get("repo"), case.meta.get("path", "")
    named = [family for family in known if name.startswith(family.prefix)]
    same_code = [family for family in known if repo == family.repo and family.source in path]
    if not named and len(same_code) == 1:
        return same_code[0]
    if not named:
        raise LookupError(f"no family of cases is called like this, {name}; known: {[f.prefix for f in known]}")
    family = max(named, key=lambda family: len(family.prefix))
    if family not in same_code:
        there = f"{family.repo}: {family.source}"
        raise LookupError(f"{family.prefix}_* comes from {there}, this case from {repo}: {path}")
    return family


def judge(path: Path, known: Sequence[Family]) -> Verdict:
    """Run one case. Whatever goes wrong, an output nobody compared included, is a failure with its reason."""
    verdict = Verdict(path.stem)
    try:
        case = Case.read(path)
        family = family_of(case, known)
        verdict.checks = family.run(case)
    except Exception as error:  # a case must not keep the others from running; the reason is printed
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"the case states no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        verdict.errors.append(f"{reason} ({Path(place.filename).name}:{place.lineno})")
        return verdict
    if not verdict.checks:
        verdict.errors.append("nothing was compared")
    compared = {check.name for check in verdict.checks}
    for name in case.outputs:
        if f"out/{name}" in compared:
            continue
        if name in family.derived:
            verdict.skipped[f"out/{name}"] = family.derived[name]
        else:
            verdict.errors.append(f"out/{name} was not compared")
    return verdict


def table(verdict: Verdict) -> str:
    """Every comparison of a case, and its verdict."""
    width = max((len(check.name) for check in verdict.checks), default=0)
    lines = [f"{verdict.case}"]
    for check in verdict.checks:
        apart, relative = check.difference
        mark = "ok" if check.passed else "FAIL"
        lines.append(f"  {check.name:<{width}}  abs {apart:8.2e}  rel {relative:8.2e}  {mark}")
    lines += [f"  {name}: not compared, {why}" for name, why in verdict.skipped.items()]
    lines += [f"  FAIL {error}" for error in verdict.errors]
    return "\n".join([*lines, f"  {'passed' if verdict.passed else 'FAILED'}"])


def record(verdict: Verdict) -> dict[str, object]:
    """A verdict as plain values, for --json."""
    checks = [
        {
            "name": check.name,
            "max_abs": check.difference[0],
            "max_rel": check.difference[1],
            "rtol": check.rtol,
            "atol": check.atol,
            "passed": check.passed,
        }
        for check in verdict.checks
    ]
    return {
        "case": verdict.case,
        "passed": verdict.passed,
        "checks": checks,
        "not_compared": verdict.skipped,
        "errors": verdict.errors,
    }


def states_config(path: Path) -> bool:
    """Whether a json file is a case's; other files that lie about are named and passed over."""
    try:
        meta = json.loads(path.read_text())
    except ValueError:
        return True  # judged, and refused with the place of the mistake
    found = isinstance(meta, dict) and "config" in meta
    if not found:
        print(f"{path}: no case, it states no config")
    return found


def main(argv: Sequence[str]) -> int:
    """Judge every case of a folder and of those in it; returns 1 if any fails or there is none."""
    parser = argparse.ArgumentParser(prog="halfseen conformance", description=__doc__)
    parser.add_argument("folder", type=Path, help="NAME.json and NAME.safetensors files")
    parser.add_argument("--only", default="*", metavar="GLOB", help="cases whose name matches")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number here")
    arguments = parser.parse_args(argv)
    files = sorted(arguments.folder.rglob("*.json"))
    cases = [path for path in files if fnmatch.fnmatch(path.stem, arguments.only) and states_config(path)]
    if not cases:
        print(f"error: no case {arguments.only} in {arguments.folder}", file=sys.stderr)
        return 1
    known = families()
    verdicts = []
    for path in cases:
        verdicts.append(judge(path, known))
        print(table(verdicts[-1]), flush=True)
    failed = [verdict.case for verdict in verdicts if not verdict.passed]
    print(f"{len(verdicts) - len(failed)} of {len(verdicts)} cases passed")
    if failed:
        print(f"failed: {' '.join(failed)}")
    if arguments.json:
        arguments.json.write_text(json.dumps([record(verdict) for verdict in verdicts], indent=1) + "\n")
    return 1 if failed else 0
