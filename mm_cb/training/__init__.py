"""Circuit-breaker training: `recipe.load_recipe` says what to do, `run.train` does it."""

from mm_cb.core.packages import prepare_torchvision

prepare_torchvision()  # before any module of this package imports transformers or peft
