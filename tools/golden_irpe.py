"""iRPE's buckets: which encoding a pair of tokens has, for every method, grid and ratio."""

from halfseen.models.irpe import Method, bucket_count, bucket_table

from .golden import Case, Check, Family, exact, numbers, refuse_unknown

# The original's names of methods -> ours; cross is the sum of its two.
METHODS: dict[str, Method] = {
    "product": "product",
    "euc": "euclidean",
    "euclidean": "euclidean",
    "quant": "quant",
    "cross_rows": "rows",
    "cross_cols": "columns",
}
DERIVED = ("alpha", "beta", "gamma", "num_buckets", "table_size", "used", "max_id")


def buckets(case: Case) -> list[Check]:
    """Each table of the case, the size it asks for, and how much of it is used."""
    checks = []
    for key, config in case.config.items():
        refuse_unknown(config, ("method", "height", "width", "ratio", "skip", *DERIVED))
        method, prefix, ratio = METHODS[config["method"]], config.get("skip", 0), config["ratio"]
        table = bucket_table(method, (config["height"], config["width"]), prefix, ratio)
        checks.append(exact(f"out/{key}", table, case.outputs[key].to(table.dtype)))
        count = bucket_count(method, prefix, ratio)
        found = {
            "alpha": ratio,
            "beta": 2 * ratio,
            "gamma": 8 * ratio,
            "num_buckets": count,
            "table_size": count,
            "used": table.unique().numel(),
            "max_id": int(table.max()),
        }
        stated = [name for name in DERIVED if name in config]
        checks.append(numbers(f"config/{key}", [found[name] for name in stated], [config[name] for name in stated]))
    return checks


FAMILIES = (Family("irpe_buckets", "microsoft/Cream", "irpe.py", buckets),)
