"""White-box image attacks on any differentiable torch function, delivered as 8-bit files.

Usable alone: nothing here knows about circuit breakers or about a particular model.

>>> import torch
>>> from image_attacks import Linf, linf_255, load_png, pgd, save_png
>>> torch.manual_seed(0)                                                   # doctest: +ELLIPSIS
<torch...>
>>> classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10)).eval()
>>> images = torch.randint(0, 256, (4, 3, 8, 8)) / 255                      # clean pixels in [0, 1]
>>> target = torch.tensor([1, 2, 3, 4])                                     # the classes the attacker wants
>>> def objective(pixels):                                                  # one value per image, minimised
...     return torch.nn.functional.cross_entropy(classifier(pixels), target, reduction="none")
>>> result = pgd(objective, images, threat_model=Linf(8 / 255), steps=20)
>>> bool((result.losses < objective(images)).all())
True
>>> result.curves.shape                                                     # (restarts, steps + 1, images)
torch.Size([1, 21, 4])

Only the file counts: save it, read it back, and judge what was read.

>>> import pathlib, tempfile
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> save_png(images[0], folder / "clean.png")
>>> save_png(result.images[0], folder / "attacked.png")
>>> linf_255(folder / "clean.png", folder / "attacked.png")
8
>>> load_png(folder / "attacked.png").shape
torch.Size([3, 8, 8])

For a vision-language model, put ``ExactPreprocessing(processor.image_processor, (height, width), plan)`` between the
pixels and the model's ``pixel_values``, where the plan says in `crop`, `resize`, `pad` and an arrangement what that
image processor does, and :func:`target_nll` behind the model's logits.
"""

from .adam import adam_pgd
from .apgd import apgd
from .benign import BENIGN_TARGETS, emitted
from .classifiers import cross_entropy, dlr, margin
from .errors import AttackError, ImageFileError, NonFiniteError, ObjectiveShapeError, ResumeError, ZeroGradientError
from .gradients import GradientHealth, gradient_health
from .image_files import as_rgb, decode_image, load_image, open_image
from .loop import AttackResult, RestartResults
from .noise import sign_noise
from .objectives import (
    cosine_distance,
    hidden_state_distance,
    logit_distillation,
    predicted_nll,
    prefix_hinge,
    target_nll,
    target_reached,
)
from .pgd import pgd
from .png import linf_255, load_png, png_levels, round_towards, save_png
from .preprocessing import ExactPreprocessing
from .random_search import random_search
from .state import AttackState
from .threat_models import L2, FileL2, Linf, Patch, ThreatModel, Unconstrained
from .transformations import Crop, Jpeg, Place, Rescale, eot
from .universal import UniversalResult, universal
from .views import Plan, ViewStep, crop, pad, resize, tiles

__all__ = [
    "BENIGN_TARGETS",
    "FileL2",
    "L2",
    "AttackError",
    "AttackResult",
    "AttackState",
    "Crop",
    "ExactPreprocessing",
    "GradientHealth",
    "ImageFileError",
    "Jpeg",
    "Linf",
    "NonFiniteError",
    "ObjectiveShapeError",
    "Patch",
    "Place",
    "Plan",
    "Rescale",
    "RestartResults",
    "ResumeError",
    "ViewStep",
    "ThreatModel",
    "Unconstrained",
    "UniversalResult",
    "ZeroGradientError",
    "adam_pgd",
    "apgd",
    "as_rgb",
    "cosine_distance",
    "crop",
    "cross_entropy",
    "decode_image",
    "dlr",
    "emitted",
    "eot",
    "gradient_health",
    "hidden_state_distance",
    "linf_255",
    "load_image",
    "load_png",
    "logit_distillation",
    "margin",
    "open_image",
    "pad",
    "pgd",
    "png_levels",
    "predicted_nll",
    "prefix_hinge",
    "random_search",
    "resize",
    "round_towards",
    "save_png",
    "sign_noise",
    "target_nll",
    "target_reached",
    "tiles",
    "universal",
]
