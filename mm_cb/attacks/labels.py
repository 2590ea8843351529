"""What people read in place of the names of conditions."""

from mm_cb.attacks.registry import attacks
from mm_cb.metrics.observations import BESIDE
from mm_cb.metrics.table import metric

CONDITIONS = {**{entry.name: entry.label for entry in attacks()}, "worst_case": "worst of all attacks"}
CONDITIONS |= {
    "worst_case_opening": "worst, opening only",
    "worst_case_supplied": "worst, supplied text",
    "worst_case_transfer": "worst, base's pictures",
    "forced_call": "forced call",
}
CONDITIONS |= {
    **{f"{BESIDE}{entry.name}": f"beside pictures under {entry.label}" for entry in attacks()},
    f"{BESIDE}no_attack": "beside clean pictures",
    f"{BESIDE}noise": "beside noisy pictures",
}


def label(names: dict[str, str], name: str) -> str:
    """The shown word for a contract name; an unknown name is shown readable: ``pgd_text`` -> ``pgd text``."""
    return names.get(name, name.replace("_", " "))


def asked(metric_name: str, condition: str) -> str:
    """Behind "answers of base": what was asked, and under what attack."""
    shown = label(CONDITIONS, condition)
    if metric_name == "compliance":
        return f"under {shown}"
    beside = f" {shown}" if condition.startswith(BESIDE) else ""
    return f"({metric(metric_name).label}{beside})"
