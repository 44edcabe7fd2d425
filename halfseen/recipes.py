"""Recipes: YAML files, found by name, to checked configs.

Precedence, lowest first: dataclass defaults, the recipe's ``base:`` files in order, the recipe, dotted overrides from
the command line. Whatever is wrong -- a typo, a type, a combination -- raises ConfigError before any device is touched.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from halfseen.config import Alarm, ConfigError, Source

Config = TypeVar("Config")


def recipe_root() -> Path:
    """The folder of the recipes that ship with the package."""
    return Path(str(resources.files("halfseen.configs")))


# Bundled files that fill one section, for the ``base:`` of recipes: they are no runs.
BASES = ("data/", "engine/")


def find_recipe(name: str, base: bool = False) -> Path:
    """A recipe's file: a path, or a bundled name such as ``pretrain/mae_b16`` (with or without .yaml).

    base: it is meant for another recipe's ``base:``, so near names may be of files that are no runs.
    """
    for candidate in (Path(name), recipe_root() / name, recipe_root() / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = [recipe for recipe, _ in recipes() if base or not recipe.startswith(BASES)]
    same = [recipe for recipe in known if recipe.rpartition("/")[2] == name]
    close = ", ".join(same or difflib.get_close_matches(name, known, 3))
    fix = f"try {close}; `halfseen recipes` lists all" if close else "`halfseen recipes` lists them"
    raise ConfigError("recipe", name, "no such file or bundled recipe", fix)


def recipes() -> list[tuple[str, str]]:
    """Every bundled recipe as (name, first comment line)."""
    found = []
    for path in sorted(recipe_root().rglob("*.yaml")):
        first = path.read_text().splitlines()[0].lstrip("# ").strip()
        found.append((path.relative_to(recipe_root()).with_suffix("").as_posix(), first))
    return found


def read_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The recipe and its bases as plain dictionaries, lowest precedence first."""
    path = path.resolve()
    if path in seen:
        raise ConfigError("base", str(path), "includes itself", "remove it from one of the base: lists")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except UnicodeDecodeError as error:
        raise ConfigError("recipe", str(path), f"is not UTF-8 text: {error}", "name a recipe in UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError("recipe", str(path), f"is not YAML: {error}", "correct the line named above") from error
    if not isinstance(content, dict):
        raise ConfigError("recipe", str(path), "is not a mapping of sections", "start with `model:`, `data:`, ...")
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) and base for base in bases):
        raise ConfigError("base", bases, f"in {path} is no recipe name", "write base: engine/ddp, a list, or no base:")
    layers: list[dict[str, Any]] = []
    for base in bases:
        here = path.parent / base
        layers += read_layers(here if here.is_file() else find_recipe(base, base=True), (*seen, path))
    return [*layers, content]


def stage_of(recipe: Path) -> str:
    """The stage a recipe or a run's config.yaml is for: its ``stage:``, else a bundled one's folder, else empty."""
    stated = [layer["stage"] for layer in read_layers(recipe) if "stage" in layer]
    folder = recipe.resolve().parent
    bundled = folder.parent == recipe_root().resolve() and f"{folder.name}/" not in BASES
    return str(stated[-1]) if stated else folder.name if bundled else ""


def _see(schema: type) -> str:
    """What to do about a name or type the schema does not know."""
    return f"see `halfseen recipes --fields {getattr(schema, 'stage', 'STAGE')}` for every option"


def _is_section(hint: Any) -> bool:
    """Whether an option's type is a dataclass of more options."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _hint(section: type, name: str, key: str, value: object, fix: str) -> Any:
    """The type of a section's option; ConfigError if there is no such option."""
    hints = typing.get_type_hints(section)
    if name not in hints:
        close = difflib.get_close_matches(name, hints, 1)
        near = f". Did you mean: {close[0]!r}?" if close else ""
        raise ConfigError(key, value, f"there is no option {name!r}{near}", fix)
    return hints[name]


def _options(section: type, values: Any, key: str, fix: str) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every option in nested mappings; ConfigError for names and shapes unknown to the schema.

    ``train: FOLDER`` and ``train: [A, B]`` are accepted where a list of Source is meant.
    """
    if not isinstance(values, dict):
        raise ConfigError(key, values, "is a section, not an option", f"name an option of it, {key}.OPTION=...; {fix}")
    for name, value in values.items():
        path = f"{key}.{name}" if key else str(name)
        hint = _hint(section, str(name), path, value, fix)
        if _is_section(hint):
            yield from _options(hint, {} if value is None else value, path, fix)
        elif hint == list[Source] and value is not None:
            entries = value if isinstance(value, list) else [value]
            entries = [entry if isinstance(entry, dict) else {"shards": str(entry)} for entry in entries]
            for number, entry in enumerate(entries):
                list(_options(Source, entry, f"{path}[{number}]", fix))
            yield path, entries
        else:
            yield path, value


def _override(schema: type, override: str) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of what ``key.sub=text`` sets, the text read as the option's type asks."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError("override", override, "is not key=value", "write e.g. optim.base_lr=1e-4, without spaces")
    hint: Any = schema
    names = key.split(".")
    for number, name in enumerate(names):
        if not _is_section(hint):
            whole = ".".join(names[:number])
            reason, example = f"{whole} has no options inside", f"{whole}=VALUE"
            if hint == list[Source]:
                reason, example = "one entry of a list cannot be set alone", f"{whole}='[{{shards: A, weight: 9}}, B]'"
            raise ConfigError(key, text, reason, f"give the whole of it, {example}; {_see(schema)}")
        hint = _hint(hint, name, key, text, _see(schema))
    nested = _typed(hint, key, text)
    for name in reversed(names):
        nested = {name: nested}
    yield from _options(schema, nested, "", _see(schema))


def _typed(hint: Any, key: str, text: str) -> Any:
    """The value an override's text stands for: plain options keep the text, the others are YAML."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if text == "null":
            return None
        hint = next(choice for choice in typing.get_args(hint) if choice is not types.NoneType)
    if hint in (str, int, float, bool) or all(isinstance(choice, str) for choice in _choices(hint)):
        return text
    loader: type[yaml.SafeLoader] | type[yaml.BaseLoader] = yaml.SafeLoader
    if hint == list[Source]:
        # A list or a mapping; anything else is one name, and so may begin with a brace or hold a colon.
        if not re.fullmatch(r"\[.*\]|\{\s*(shards|weight)\s*:.*\}", text, re.DOTALL):
            return text
        loader = yaml.BaseLoader  # a shard named 1e3 or yes stays text
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(key, text, f"is not YAML: {problem}", f"close brackets and quotes: {key}='[A, B]'") from error


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values of a Literal; (None,) for other types."""
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else (None,)


# An option that an entry of a list must have -> what the entry is.
LISTED: dict[str, type[Any]] = {"shards": Source, "scalar": Alarm}


def stated(
    schema: type[Config],
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    mappings: Sequence[dict[str, Any]] = (),
) -> list[tuple[str, Any]]:
    """What a recipe, mappings and overrides say, lowest precedence first: dotted key and value, not yet typed.

    The arguments are those of ``load``. Raises ConfigError for a name the schema does not know.
    """
    layers = [*(read_layers(find_recipe(str(recipe))) if recipe else []), *mappings]
    options = [option for layer in layers for option in _options(schema, layer, "", _see(schema))]
    return options + [option for override in overrides for option in _override(schema, override)]


def load(
    schema: type[Config],
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    mappings: Sequence[dict[str, Any]] = (),
) -> Config:
    """Build a checked config.

    recipe: path or bundled name; None starts from the defaults. mappings: more sections, as a recipe holds them, that
    override it. overrides: ``key.sub=value`` strings, which override both.
    Raises ConfigError with the key, the value and the fix.
    """
    options = stated(schema, recipe, overrides, mappings)
    merged = OmegaConf.structured(schema)
    given: dict[str, Any] = {}
    key = ""
    try:
        for key, value in options:
            given[key] = value
            for name, kind in LISTED.items():
                if isinstance(value, list) and any(isinstance(entry, dict) and name in entry for entry in value):
                    value = [OmegaConf.merge(kind, entry) for entry in value]
            OmegaConf.update(merged, key, value, merge=False)
        key = ""
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = key or str(getattr(error, "full_key", None) or "config")
        reason = str(error.msg or error).strip().splitlines()[0]
        value = given.get(key, "")
        reason = reason.replace("$VALUE_TYPE", type(value).__name__).replace("$VALUE", str(value))
        raise ConfigError(key, value, reason, _see(schema)) from error
    for section_key, section in sections(config):
        if hasattr(section, "check"):
            section.check(section_key)
    return typing.cast(Config, config)


def sections(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The config and every dataclass inside it, each with its dotted key."""
    yield key, config
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from sections(value, f"{key}.{item.name}" if key else item.name)


def to_yaml(config: Any) -> str:
    """The whole config as YAML that ``load`` reads back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def changes(config: Any) -> dict[str, Any]:
    """Dotted key -> value for every option that differs from its default."""
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    default = OmegaConf.to_container(OmegaConf.structured(type(config)))

    def walk(a: Any, b: Any, key: str) -> Iterator[tuple[str, Any]]:
        for name, value in a.items():
            path = f"{key}.{name}" if key else name
            if isinstance(value, dict) and isinstance(b.get(name), dict):
                yield from walk(value, b[name], path)
            elif value != b.get(name):
                yield path, value

    return dict(walk(plain, default, ""))
