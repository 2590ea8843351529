import pytest
import torch

from .helpers import build_processor


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)


@pytest.fixture(params=["pil", "torchvision"])
def processor(request):
    return build_processor(request.param)


@pytest.fixture
def pil_processor():
    return build_processor("pil")
