import pytest
import torch

from mm_cb.training.precision import adapter_products


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cuda", torch.bfloat16, "high"),
        ("cuda", torch.float16, "high"),
        ("cuda", torch.float32, "highest"),
        ("cpu", torch.bfloat16, "highest"),
    ],
)
def test_only_beside_a_half_model_on_a_gpu_are_the_adapters_products_in_tf32(device, dtype, expected):
    with pytest.raises(KeyboardInterrupt), adapter_products(torch.device(device), dtype):
        assert torch.get_float32_matmul_precision() == expected
        raise KeyboardInterrupt
    assert torch.get_float32_matmul_precision() == "highest"
