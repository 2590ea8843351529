"""Two independent implementations of the same attacks, foolbox and the Adversarial Robustness Toolbox."""

import importlib
import os
import warnings

import numpy as np
import pytest
import torch


def oracle(name):
    """Import an oracle; where it is missing, a laptop skips the test and continuous integration fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        message = f"the oracle {name} is missing ({error}); install the extra `dev`"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(message)
        pytest.skip(message)


def foolbox_attack(kind, network, images, labels, epsilon, **options):
    """Images of a foolbox attack on pixels in [0, 1]; it draws from the global generator."""
    foolbox = oracle("foolbox")
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    attack = getattr(foolbox.attacks, kind)(**options)
    return attack(model, images, foolbox.criteria.Misclassification(labels), epsilons=epsilon)[1].detach()


def art_attack(kind, network, images, labels, **options):
    """Images of an attack of the Adversarial Robustness Toolbox; it draws from numpy's global generator."""
    classification = oracle("art.estimators.classification")
    evasion = oracle("art.attacks.evasion")
    estimator = classification.PyTorchClassifier(
        network,
        torch.nn.CrossEntropyLoss(),
        input_shape=tuple(images.shape[1:]),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = getattr(evasion, kind)(estimator, batch_size=len(images), verbose=False, **options)
    return torch.from_numpy(np.asarray(attack.generate(images.numpy(), labels.numpy())))
