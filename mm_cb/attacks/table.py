"""The table of attacks that are shipped; one of your own is a row like these."""

from __future__ import annotations

from typing import Any

from mm_cb.attacks.entry import AttackEntry

_OBJECTIVES = "mm_cb.attacks.objectives"
_TARGET = f"{_OBJECTIVES}.target:target_objective"


def _forcing(name: str, about: str, label: str, objective: str, **more: Any) -> AttackEntry:
    """A row of PGD towards a long response."""
    reference = f"{_OBJECTIVES}.{objective}"
    return AttackEntry(name, about, label, "pgd", reference, given="supplied text", forces_response=True, **more)


_DIALLED: dict[str, Any] = {"first_step": 16 / 255, "anneal": "loss", "needs_adapter": True}
"""PGD while the adapter is dialled up."""

SHIPPED = (
    AttackEntry(
        "no_attack",
        "the clean picture, or the prompt alone: control",
        "no attack",
        "clean",
        given="nothing",
        needs_picture=False,
        in_worst_case=False,
    ),
    AttackEntry(
        "noise", "random signs of the same size: placebo", "random noise", "noise", given="nothing", in_worst_case=False
    ),
    AttackEntry("pgd", "projected gradient descent on the target's loss", "PGD", "pgd", _TARGET),
    _forcing(
        "pgd_long",
        "a long answer by the base model; later tokens weigh more",
        "long-target PGD",
        "adaptive:LongTargetObjective",
    ),
    _forcing(
        "pgd_adaptive",
        "hidden states back to the base model's, by their cosine",
        "adaptive PGD",
        "adaptive:MatchingObjective",
        needs_adapter=True,
    ),
    _forcing(
        "pgd_clean_teacher",
        "hidden states to those of the complying base model, by their distance",
        "clean-teacher PGD",
        "adaptive:CleanTeacherObjective",
        needs_adapter=True,
    ),
    _forcing(
        "pgd_homotopy",
        "a long answer by the base model, the adapter dialled up from zero on the way",
        "homotopy PGD",
        "homotopy:HomotopyObjective",
        **_DIALLED,
    ),
    AttackEntry(
        "pgd_homotopy_opening",
        "the target's loss alone, the adapter dialled up from zero on the way",
        "opening-only homotopy PGD",
        "pgd",
        _TARGET,
        **_DIALLED,
    ),
    _forcing(
        "pgd_facts",
        "the bare facts of the answer, without a sentence: the behaviours' `facts`",
        "bare-facts PGD",
        "facts:FactsObjective",
        fields=("facts",),
    ),
    AttackEntry(
        "pgd_form",
        "the form of an answer, any of some words in its gaps, hidden states back to the base model's, dialled up",
        "form-and-words PGD",
        "pgd",
        f"{_OBJECTIVES}.form:FormObjective",
        **_DIALLED,
        fields=("form",),
        given="form and words",
    ),
    AttackEntry(
        "pgd_form_found",
        "the same, with form and words found in the model's answers to harmless requests and in its vocabulary",
        "found-form PGD",
        "pgd",
        f"{_OBJECTIVES}.found_form:FoundFormObjective",
        **_DIALLED,
        fields=("harmless",),
    ),
    _forcing(
        "pgd_distill",
        "next words as the base model's",
        "distilling PGD",
        "adaptive:DistillObjective",
        needs_adapter=True,
        in_all=False,
    ),
    _forcing(
        "pgd_fluent",
        "words that the base model finds likely",
        "fluent PGD",
        "adaptive:FluentObjective",
        needs_adapter=True,
        in_all=False,
    ),
    _forcing(
        "pgd_probe",
        "a long answer whose states a harmfulness probe does not flag",
        "probe-aware PGD",
        "probe:ProbeObjective",
        needs_probe=True,
    ),
    AttackEntry("apgd", "Auto-PGD's steps on the target's loss", "APGD", "apgd", _TARGET),
    AttackEntry(
        "typographic",
        "the request written into the picture; black box, no gradient",
        "typographic",
        "draw",
        draw="mm_cb.attacks.typographic:draw",
        ask="mm_cb.attacks.typographic:ask",
        given="nothing",
    ),
    AttackEntry(
        "best_of_n",
        "many random variations of picture or text, any of which may succeed; black box, no gradient",
        "best of N",
        "vary",
        reads=("draws", "strength", "vary"),
        given="nothing",
        in_all=False,
    ),
    AttackEntry(
        "pgd_transfer",
        "the base's loss of the target under random low-rank changes; never sees the adapter it is judged on",
        "transfer PGD",
        "pgd",
        f"{_OBJECTIVES}.transfer:TransferObjective",
        reads=("surrogate", "surrogate_scale"),
        given="base's pictures",
        in_all=False,
    ),
    AttackEntry(
        "pgd_eot",
        "the target's loss in expectation over place (of a patch), scale and JPEG",
        "EOT PGD",
        "pgd",
        f"{_OBJECTIVES}.expectation:EotObjective",
        reads=("eot_samples", "eot_scale", "eot_quality"),
        in_all=False,
    ),
    AttackEntry(
        "universal",
        "one picture for many behaviours, some held out; alone in its run",
        "universal picture",
        "pgd",
        f"{_OBJECTIVES}.universal:UniversalObjective",
        reads=("universal_train", "minibatch"),
        universal=True,
        in_worst_case=False,
        in_all=False,
    ),
    AttackEntry(
        "universal_corpus",
        "one picture for a text file of yours, judged on behaviours it never saw; alone in its run",
        "universal picture of a corpus",
        "pgd",
        f"{_OBJECTIVES}.universal:UniversalObjective",
        reads=("corpus", "minibatch"),
        universal=True,
        in_worst_case=False,
        in_all=False,
    ),
    AttackEntry(
        "prefill_only",
        "nothing changed but that the target is prefilled: control",
        "prefilled answer",
        "clean",
        prefilled=True,
        needs_picture=False,
        in_worst_case=False,
        in_all=False,
    ),
    _forcing(
        "prefill",
        "picture and prefilled target",
        "picture and prefilled answer",
        "adaptive:ContinuationObjective",
        prefilled=True,
        in_worst_case=False,
        in_all=False,
    ),
    AttackEntry(
        "embedding",
        "embeddings of the picture, or of the prompt where there is none: a relaxation that no input reaches",
        "embedding relaxation",
        "embedding",
        f"{_OBJECTIVES}.embedding:embedding_objective",
        needs_picture=False,
        in_worst_case=False,
        in_all=False,
    ),
    AttackEntry(
        "steering",
        "hidden states, along the way from what the model says to the opening: a relaxation that no input reaches",
        "steered states (RepE)",
        "embedding",
        f"{_OBJECTIVES}.steering:steering_objective",
        needs_picture=False,
        in_worst_case=False,
        in_all=False,
    ),
    AttackEntry(
        "gcg",
        "a suffix behind the prompt, searched token by token; for models of text alone",
        "suffix search (GCG)",
        "suffix",
        _TARGET,
        reads=("candidates",),
        needs_picture=False,
        in_all=False,
    ),
    AttackEntry(
        "gcg_probe",
        "the same, and the score that a harmfulness probe gives a long answer's states",
        "probe-aware suffix search",
        "suffix",
        _TARGET,
        reads=("candidates",),
        needs_probe=True,
        needs_picture=False,
        in_all=False,
    ),
    AttackEntry(
        "imported",
        "prompts made elsewhere (GCG, PAIR, PyRIT, several turns), from --prompts",
        "imported prompts",
        "clean",
        given="nothing",
        needs_picture=False,
        imported=True,
        in_all=False,
    ),
)
