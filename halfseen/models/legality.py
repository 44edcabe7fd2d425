"""Which parts of a trunk can stand together. Reads the config alone: no tensor is made."""

from halfseen.config import ConfigError, Model

from .sizes import resolve

OVER_A_MAP = ("strided", "convolutional")  # kinds of attention that need the whole grid, and nothing but it


def check(cfg: Model) -> None:
    """Raise ConfigError, with reason and fix, for parts that cannot stand together."""
    size = resolve(cfg)
    shared = shares(cfg)
    if shared and cfg.parallel > 1:
        raise ConfigError(
            *shared,
            f"weight sharing is defined for sequential blocks, not for model.parallel={cfg.parallel}",
            "use blocks of their own, model.share=1, or model.parallel=1",
        )
    if cfg.parallel > 1 and cfg.norm_place != "pre":
        raise ConfigError(
            "model.norm_place",
            cfg.norm_place,
            f"the branches of model.parallel={cfg.parallel} are each normed before, so that they read one input",
            "use model.norm_place=pre or model.parallel=1",
        )
    if cfg.position == "sincos" and size.width % 4:
        raise ConfigError("model.position", "sincos", f"needs a width divisible by 4, not {size.width}", "learned")
    if cfg.rope and size.width // size.heads % 4:
        raise ConfigError(
            "model.rope",
            True,
            f"turns channels in pairs on two axes, so heads of {size.width // size.heads} channels do not divide by 4",
            "use another model.heads",
        )
    if cfg.distillation_token and not cfg.class_token:
        raise ConfigError(
            "model.distillation_token",
            True,
            "is a second token beside the class token, and there is none",
            "use model.class_token=true",
        )
    if cfg.irpe != "none" and cfg.irpe_mode == "bias" and "v" in cfg.irpe_on:
        raise ConfigError(
            "model.irpe_on",
            cfg.irpe_on,
            "values have no scores to add a bias to",
            "use model.irpe_mode=contextual, or leave v out of model.irpe_on",
        )
    _check_attention(cfg, size.depth)
    _check_peg(cfg, size.depth)


def shares(cfg: Model) -> tuple[str, object] | None:
    """The option that lets blocks share weights, and its value; None if none do."""
    if max(cfg.groups, default=1) > 1:
        return "model.groups", cfg.groups
    return ("model.share", cfg.share) if cfg.share > 1 else None


def _check_attention(cfg: Model, depth: int) -> None:
    if cfg.attention_blocks:
        unknown = sorted(set(cfg.attention_blocks) - set(range(depth)))
        if unknown or cfg.attention == "softmax":
            reason = f"there are no blocks {unknown}" if unknown else "names blocks, but model.attention is softmax"
            raise ConfigError(
                "model.attention_blocks", cfg.attention_blocks, reason, f"use numbers from 0 to {depth - 1}"
            )
        if shares(cfg):
            raise ConfigError(
                "model.attention_blocks",
                cfg.attention_blocks,
                "consecutive blocks share one attention, as model.share or model.groups says",
                "use model.share=1, or the same attention in all blocks",
            )
    if cfg.head_width is not None and cfg.attention not in OVER_A_MAP:
        raise ConfigError(
            "model.head_width",
            cfg.head_width,
            f"model.attention={cfg.attention} splits the width among its heads",
            f"leave it out, or use model.attention={' or '.join(OVER_A_MAP)}",
        )
    if cfg.attention not in OVER_A_MAP:
        return
    if cfg.attention == "convolutional" and cfg.attention_kernel % 2 == 0:
        raise ConfigError("model.attention_kernel", cfg.attention_kernel, "has no centre", "use an odd number")
    for name, off in OFF_OVER_A_MAP.items():
        if getattr(cfg, name) != off:
            raise ConfigError(
                f"model.{name}",
                getattr(cfg, name),
                f"model.attention={cfg.attention} works on the grid of patches and has no place for it",
                f"use model.{name}={str(off).lower()}, or another model.attention",
            )


# What attention over a map excludes: tokens without a place in the grid, and parts that act on scores of token pairs.
OFF_OVER_A_MAP = {
    "class_token": False,
    "distillation_token": False,
    "registers": 0,
    "relative": "none",
    "irpe": "none",
    "rope": False,
    "attention_dropout": 0.0,
    "head_mixing": "none",
    "key_bias": True,
}


def _check_peg(cfg: Model, depth: int) -> None:
    if cfg.peg > depth:
        raise ConfigError("model.peg", cfg.peg, f"there are only {depth} blocks to stand behind", f"at most {depth}")
    if cfg.peg and shares(cfg):
        raise ConfigError(
            "model.peg",
            cfg.peg,
            "blocks that share weights (model.share, model.groups) run as one, so nothing can stand between them",
            "use model.share=1 or model.peg=0",
        )


def check_visible_only(cfg: Model) -> None:
    """Raise ConfigError unless an encoder of visible patches alone computes for them what it is meant to.

    No token may see another's pixels before attention, none may need a neighbour that is hidden, and no statistics may
    depend on how many are.
    """
    if cfg.stem == "conv":
        raise ConfigError(
            "model.stem",
            "conv",
            "overlapping convolutions see hidden pixels, so an encoder of visible patches cannot",
            "use model.stem=hmlp (patch by patch, LayerNorm) or model.stem=patch",
        )
    if cfg.stem == "hmlp" and cfg.stem_norm == "batch":
        raise ConfigError(
            "model.stem_norm",
            "batch",
            "in training BatchNorm mixes patches through its statistics, so a token would depend on "
            "others and the statistics on the mask",
            "use model.stem_norm=layer",
        )
    if cfg.attention in OVER_A_MAP:
        raise ConfigError(
            "model.attention",
            cfg.attention,
            "needs the whole grid of patches, and an encoder of visible patches has holes in it",
            "use model.attention=softmax, or an objective that replaces hidden patches by a mask token",
        )
    if cfg.attention == "reattention":
        raise ConfigError(
            "model.attention",
            "reattention",
            "its BatchNorm over attention maps would learn statistics of few tokens, wrong for all of them later",
            "use model.attention=softmax, or an objective that replaces hidden patches by a mask token",
        )
    if cfg.peg:
        raise ConfigError(
            "model.peg",
            cfg.peg,
            "a convolution over the grid needs the hidden patches",
            "use model.peg=0, or an objective that replaces hidden patches by a mask token",
        )
    if cfg.norm == "power":
        raise ConfigError(
            "model.norm",
            "power",
            "its statistics run over all tokens of a batch, so they would depend on the mask",
            "use model.norm=layer, or an objective that replaces hidden patches by a mask token",
        )
