from pathlib import Path

import matplotlib
import numpy as np
import pytest
import sklearn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from image_attacks import ExactPreprocessing, Linf, Plan, crop, load_image, load_png, pad, pgd, resize, save_png, tiles
from image_attacks.resampling import RECIPES, Resize, ResizeRecipe, fitting_resize
from image_attacks.views import Views

from .helpers import any_resolution, build_processor, eight_bit

SIZES = [
    *((42, 84), (84, 42), (84, 84), (42, 42)),
    *((41, 83), (43, 85), (37, 61), (61, 37), (57, 57), (99, 99)),
    *((1, 1), (2, 3), (20, 20), (20, 100), (100, 20), (1, 90), (90, 1)),
    *((300, 41), (168, 84), (200, 150), (150, 200), (255, 40)),
]

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def pictures(size, generator):
    """8-bit images: two of noise, one of black and white noise, a ramp with noise, all black, all white."""
    noise = eight_bit((2, 3, *size), generator)
    contrast = (eight_bit((1, 3, *size), generator) > 0.5).float()
    ramp = torch.linspace(0, 1, size[1]).expand(1, 3, *size)
    smooth = ((ramp * 0.8 + 0.2 * noise[:1]) * 255).round() / 255
    return torch.cat([noise, contrast, smooth, torch.zeros(1, 3, *size), torch.ones(1, 3, *size)])


def real(processor, pixels):
    """The processor's own answer for what a user would upload."""
    arrays = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return processor(images=[Image.fromarray(array) for array in arrays], return_tensors="pt")["pixel_values"]


def level_size(processor):
    return 1 / (255 * torch.tensor(processor.image_std)).view(3, 1, 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_is_bit_equal_to_the_processor_and_fast(processor, size, generator):
    preprocess = any_resolution(processor, size)
    pixels = pictures(size, generator)
    assert torch.equal(preprocess(pixels), real(processor, pixels))
    assert preprocess.exact_by == "emulation"


@settings(deadline=None, max_examples=25)
@given(
    backend=st.sampled_from(["pil", "torchvision"]),
    size=st.tuples(st.integers(1, 130), st.integers(1, 130)),
    seed=st.integers(0, 10**6),
)
def test_forward_is_bit_equal_on_any_size(backend, size, seed):
    processor = build_processor(backend)
    pixels = eight_bit((2, 3, *size), torch.Generator().manual_seed(seed))
    assert torch.equal(any_resolution(processor, size)(pixels), real(processor, pixels))


@pytest.mark.parametrize("size", [(336, 500), (512, 300), (336, 336), (100, 500)], ids=str)
@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_forward_is_bit_equal_at_full_scale(backend, size, generator):
    processor = build_processor(backend, tile=336, pinpoints=PINPOINTS)
    preprocess = any_resolution(processor, size)
    pixels = pictures(size, generator)[1:3]
    expected = real(processor, pixels)
    assert torch.equal(preprocess(pixels), expected)
    assert ((preprocess.surrogate(pixels) - expected).abs() / level_size(processor)).max() <= 1.2


SCIKIT, MATPLOTLIB = Path(sklearn.__file__).parent / "datasets" / "images", Path(matplotlib.get_data_path())
PHOTOS = [SCIKIT / "china.jpg", SCIKIT / "flower.jpg", MATPLOTLIB / "sample_data" / "grace_hopper.jpg"]
"""Two landscapes of 640 x 427 and a portrait of 512 x 600, from packages that the tests install; none is shipped."""


VIEWS = [pytest.param(photo, False, id=photo.stem) for photo in PHOTOS]
VIEWS += [pytest.param(PHOTOS[1], True, id="flower, transposed")]


@pytest.mark.parametrize(("photo", "turned"), VIEWS)
@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_photos_too_are_exact_forward_and_within_1_2_levels_backward(backend, photo, turned, generator):
    """As they are, and with random signs of 64 levels, where surrogates of one pass are off by 18 to 35."""
    clean = load_image(photo).unsqueeze(0)
    clean = clean.transpose(2, 3).contiguous() if turned else clean
    signs = torch.where(torch.rand(clean.shape, generator=generator) < 0.5, -64 / 255, 64 / 255)
    pixels = torch.cat([clean, ((clean + signs).clamp(0, 1) * 255).round() / 255])
    processor = build_processor(backend, tile=336, pinpoints=PINPOINTS)
    preprocess = any_resolution(processor, (clean.shape[2], clean.shape[3]))
    expected = real(processor, pixels)
    assert torch.equal(preprocess(pixels), expected)
    assert ((preprocess.surrogate(pixels) - expected).abs() / level_size(processor)).max() <= 1.2


def test_pixels_between_levels_are_rounded_to_the_nearest_as_in_the_file(processor, generator, tmp_path):
    preprocess = any_resolution(processor, (42, 84))
    pixels = torch.rand(2, 3, 42, 84, generator=generator)
    for index, image in enumerate(pixels):
        save_png(image, tmp_path / f"{index}.png")
    from_files = torch.stack([load_png(tmp_path / f"{index}.png") for index in range(2)])
    assert torch.equal(preprocess(pixels), preprocess(from_files))
    reread = [Image.open(tmp_path / f"{index}.png") for index in range(2)]
    assert torch.equal(preprocess(pixels), processor(images=reread, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_surrogate_stays_within_a_level_of_the_processor(processor, size, generator):
    pixels = pictures(size, generator)
    error = (any_resolution(processor, size).surrogate(pixels) - real(processor, pixels)).abs()
    assert (error / level_size(processor)).max() <= 1.2


def test_other_normalisations_are_followed(generator):
    plain = build_processor("pil", do_normalize=False)
    strange = build_processor("torchvision", image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 1.0, 2.0])
    small = build_processor("pil", tile=14, pinpoints=[[14, 28], [28, 28]])
    for processor in (plain, strange, small):
        pixels = pictures((30, 50), generator)
        assert torch.equal(any_resolution(processor, (30, 50))(pixels), real(processor, pixels))


def test_base_view_comes_first_and_tiles_row_by_row(processor):
    image = torch.zeros(1, 3, 84, 84)
    image[:, 0, :42, :42], image[:, 1, :42, 42:], image[:, 2, 42:, :42] = 1, 1, 1
    low, high = real(processor, torch.zeros(1, 3, 42, 42))[0, 0], real(processor, torch.ones(1, 3, 42, 42))[0, 0]
    views = (any_resolution(processor, (84, 84))(image)[0] - low) / (high - low)
    assert views.shape == (5, 3, 42, 42)
    brightness = views.mean(dim=(2, 3))
    torch.testing.assert_close(brightness[1:], torch.eye(4, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(brightness[0], torch.full((3,), 0.25), atol=0.01, rtol=0)


@pytest.mark.parametrize("size", [(42, 42), (30, 84), (61, 37), (100, 20)], ids=str)
def test_padding_is_black_whatever_the_pixels_and_takes_no_gradient(processor, size, generator):
    preprocess = any_resolution(processor, size)
    black, white = preprocess(torch.zeros(1, 3, *size)), preprocess(torch.ones(1, 3, *size))
    padding = black == white
    assert padding.any()
    pixels = torch.rand(1, 3, *size, generator=generator, requires_grad=True)
    views = preprocess(pixels)
    assert torch.equal(views[padding], black[padding])
    (gradient,) = torch.autograd.grad((views * padding).sum(), pixels)
    assert (gradient == 0).all()


@pytest.mark.parametrize("size", [(42, 84), (61, 37), (5, 7), (150, 90)], ids=str)
def test_gradient_is_that_of_the_surrogate(processor, size, generator):
    """Away from the clamps both paths are linear, so that their gradients agree to rounding error."""
    preprocess = any_resolution(processor, size)
    pixels = (0.3 + 0.4 * torch.rand(2, 3, *size, generator=generator)).requires_grad_()
    views = preprocess(pixels)
    weights = torch.randn(views.shape, generator=generator)
    (exact,) = torch.autograd.grad((views * weights).sum(), pixels)
    (smooth,) = torch.autograd.grad((preprocess.surrogate(pixels) * weights).sum(), pixels)
    torch.testing.assert_close(exact, smooth, rtol=1e-4, atol=1e-4 * smooth.abs().max().item())


@pytest.mark.parametrize("size", [(42, 84), (61, 37)], ids=str)
def test_gradient_signs_agree_with_the_surrogate_at_the_clamps_too(pil_processor, size, generator):
    preprocess = any_resolution(pil_processor, size)
    pixels = pictures(size, generator)[:4].requires_grad_()
    weights = torch.randn(preprocess(pixels).shape, generator=generator)
    (exact,) = torch.autograd.grad((preprocess(pixels) * weights).sum(), pixels)
    (smooth,) = torch.autograd.grad((preprocess.surrogate(pixels) * weights).sum(), pixels)
    assert (exact.sign() == smooth.sign()).float().mean() > 0.97


@pytest.mark.parametrize("size", [(6, 11), (11, 5), (9, 9)], ids=str)
def test_surrogate_passes_gradcheck(size, generator):
    processor = build_processor("pil", tile=4, pinpoints=[[4, 8], [8, 4], [8, 8]])
    preprocess = any_resolution(processor, size)
    pixels = (0.3 + 0.4 * torch.rand(1, 3, *size, generator=generator)).double().requires_grad_()
    assert torch.autograd.gradcheck(preprocess.surrogate, pixels, atol=1e-6)


def test_clamps_block_the_gradient_of_overshooting_values():
    resize = Resize((1, 4), (1, 8), ResizeRecipe("horizontal", "pillow"))
    edge = torch.tensor([0.0, 0.0, 255.0, 255.0]).view(1, 4).requires_grad_()
    resized = resize.exact(edge)
    overshoot = (resized == 255) | (resized == 0)
    for position in range(8):
        (gradient,) = torch.autograd.grad(resized[0, position], edge, retain_graph=True)
        assert bool((gradient == 0).all()) == bool(overshoot[0, position]) or resized[0, position] in (0, 255)
    assert overshoot.any() and not overshoot.all()


def test_losses_move_as_the_gradient_says(processor, generator):
    """A step of some levels along minus the gradient lowers a smooth loss of the exact views."""
    preprocess = any_resolution(processor, (42, 84))
    pixels = (0.2 + 0.6 * torch.rand(3, 3, 42, 84, generator=generator)).requires_grad_()
    goal = torch.randn(preprocess(pixels).shape, generator=generator)
    losses = (preprocess(pixels) - goal).square().flatten(1).mean(1)
    (gradient,) = torch.autograd.grad(losses.sum(), pixels)
    moved = preprocess((pixels - 4 / 255 * gradient.sign()).detach())
    assert ((moved - goal).square().flatten(1).mean(1) < losses).all()


def test_attacked_file_has_the_logged_loss_through_the_real_processor(processor, generator, tmp_path):
    preprocess = any_resolution(processor, (42, 84))
    images = eight_bit((3, 3, 42, 84), generator)
    weights = torch.randn(3, 3, 42, 42, generator=generator)

    def model(pixel_values):
        return torch.tanh(pixel_values * weights).flatten(1).mean(1)

    result = pgd(lambda pixels: model(preprocess(pixels)), images, threat_model=Linf(16 / 255), steps=10)
    for index, image in enumerate(result.images):
        save_png(image, tmp_path / f"{index}.png")
    files = [Image.open(tmp_path / f"{index}.png") for index in range(3)]
    with torch.no_grad():
        losses = model(processor(images=files, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(losses, result.losses, atol=1e-6, rtol=0)
    assert (result.losses < model(preprocess(images))).all()


class Shifted:
    """A processor whose resize differs a little from every library's: the emulation cannot reproduce it."""

    def __init__(self, processor):
        self._processor = processor

    def __getattr__(self, name):
        return getattr(self._processor, name)

    def __call__(self, images, return_tensors):
        found = self._processor(images=images, return_tensors=return_tensors)
        if images[0].size != (42, 42):
            found["pixel_values"][..., 0, 0] += 1e-3
        return found


def test_a_processor_that_cannot_be_emulated_is_called_itself(pil_processor, generator):
    shifted = Shifted(pil_processor)
    preprocess = any_resolution(shifted, (43, 60))
    assert preprocess.exact_by == "processor"
    pixels = pictures((43, 60), generator).requires_grad_()
    views = preprocess(pixels)
    assert torch.equal(views, real(shifted, pixels.detach()))
    (gradient,) = torch.autograd.grad(views.sum(), pixels)
    (smooth,) = torch.autograd.grad(preprocess.surrogate(pixels).sum(), pixels)
    assert torch.equal(gradient, smooth)


class Doubled(Shifted):
    """A processor that rescales twice."""

    def __call__(self, images, return_tensors):
        found = self._processor(images=images, return_tensors=return_tensors)
        if images[0].size != (42, 42):
            found["pixel_values"] = found["pixel_values"] / 255
        return found


def test_a_processor_that_does_something_else_is_refused(pil_processor):
    with pytest.raises(ValueError, match="levels for images of \\(43, 60\\)"):
        any_resolution(Doubled(pil_processor), (43, 60))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resample": 2}, "bicubic"),
        ({"size": {"shortest_edge": 40}}, "one and the same square"),
        ({"crop_size": {"height": 42, "width": 40}}, "one and the same square"),
        ({"image_grid_pinpoints": [[42, 80]]}, "multiple of the tile"),
    ],
)
def test_settings_that_are_not_followed_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        any_resolution(build_processor("pil", **settings), (42, 84))


def test_other_objects_and_sizes_are_refused(pil_processor):
    with pytest.raises(ValueError, match="must be a LLaVA-NeXT image processor, got object"):
        any_resolution(object(), (42, 84))
    with pytest.raises(ValueError, match="`image_size`"):
        ExactPreprocessing(pil_processor, (0, 84), Plan([[]], lambda views: views[0]))


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        (torch.zeros(1, 3, 84, 42), ValueError, "shape"),
        (torch.zeros(3, 42, 84), ValueError, "shape"),
        (torch.zeros(1, 1, 42, 84), ValueError, "shape"),
        (torch.full((1, 3, 42, 84), 200.0), ValueError, "must lie in \\[0, 1\\]"),
        (torch.zeros(1, 3, 42, 84, dtype=torch.bfloat16), TypeError, "float32"),
    ],
)
def test_bad_pixels_are_refused(pil_processor, pixels, error, message):
    with pytest.raises(error, match=message):
        any_resolution(pil_processor, (42, 84))(pixels)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
@pytest.mark.parametrize("size", [(61, 37), (30, 84), (20, 20), (100, 20)], ids=str)
def test_other_modes_are_what_the_processor_makes_of_the_file_a_user_uploads(
    processor, mode, size, generator, tmp_path
):
    levels = torch.randint(0, 256, (*size, 4), generator=generator, dtype=torch.uint8).numpy()
    picture = Image.fromarray(levels, "RGBA")
    (picture if mode == "RGBA" else picture.convert("RGB").convert(mode)).save(tmp_path / "upload.png")
    uploaded = Image.open(tmp_path / "upload.png")
    expected = processor(images=[uploaded], return_tensors="pt")["pixel_values"]
    pixels = load_image(tmp_path / "upload.png").unsqueeze(0)
    preprocess = any_resolution(processor, size)
    assert torch.equal(preprocess(pixels), expected)
    assert ((preprocess.surrogate(pixels) - expected).abs() / level_size(processor)).max() <= 1.2


@pytest.mark.parametrize("size", [(28, 40), (61, 37), (300, 41), (40, 28)], ids=str)
@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_a_plan_with_a_crop_is_followed_exactly(backend, size, generator):
    processor = _clip(backend)
    longer = int(28 * max(size) / min(size))
    rows, columns = (longer, 28) if size[1] == min(size) else (28, longer)
    middle = crop((rows - 28) // 2, (columns - 28) // 2, 28, 28)
    preprocess = ExactPreprocessing(processor, size, Plan([[resize(rows, columns), middle]], lambda views: views[0]))
    pixels = pictures(size, generator)
    assert torch.equal(preprocess(pixels), real(processor, pixels)) and preprocess.exact_by == "emulation"


def _clip(backend):
    from transformers.models.clip import image_processing_clip, image_processing_pil_clip

    kinds = {
        "pil": image_processing_pil_clip.CLIPImageProcessorPil,
        "torchvision": image_processing_clip.CLIPImageProcessor,
    }
    return kinds[backend](size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


@pytest.mark.parametrize("resample", [1, 2, 3], ids=["lanczos", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(300, 900), (900, 300), (37, 61)], ids=str)
def test_every_resize_of_a_chain_is_pillows_and_the_surrogate_stays_near(size, resample, generator):
    """Three resizes in a row, as some processors have; Pillow orders the passes of each by its own sizes."""
    chain, levels = [(224, 448), (112, 112), (60, 90)], (pictures(size, generator)[:3] * 255).round()
    views = Views([[resize(*target, resample) for target in chain]], size, "pil")
    images = [Image.fromarray(one.to(torch.uint8).permute(1, 2, 0).numpy()) for one in levels]
    for height, width in chain:
        images = [image.resize((width, height), resample) for image in images]
    expected = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() for image in images])
    assert torch.equal(*views.exact(levels), expected)
    assert (views.smooth(levels / 255)[0] * 255 - expected).abs().max() <= 1.2 * len(chain)


def test_a_large_resize_multiplies_next_to_no_zeros_and_is_pillows(generator):
    levels = torch.randint(0, 256, (1, 3, 480, 640), generator=generator, dtype=torch.uint8)
    made = fitting_resize((480, 640), (1152, 1536), 1, "pil")
    image = Image.fromarray(levels[0].permute(1, 2, 0).numpy()).resize((1536, 1152), 1)
    assert torch.equal(made.exact(levels.float())[0], torch.from_numpy(np.array(image)).permute(2, 0, 1).float())
    for one in made._passes:
        target, source = one._exact.shape
        assert sum(weights.numel() for _, weights in one.exact) < target * source / 10
        whole = torch.cat(
            [torch.zeros(len(w), source).index_copy(1, torch.arange(source)[c], w) for c, w in one.smooth]
        )
        assert torch.equal(whole, one._smooth)


@settings(deadline=None, max_examples=25)
@given(
    source=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    target=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    resample=st.sampled_from([2, 3]),
    seed=st.integers(0, 10**6),
)
def test_torchs_own_resize_and_narrow_sums_are_the_exact_ones_forward_and_backward(source, target, resample, seed):
    generator = torch.Generator().manual_seed(seed)
    levels = (eight_bit((2, 3, *source), generator) * 255).round()
    levels = torch.cat([levels, (levels > 127) * 255.0]).requires_grad_()
    weights, found = torch.randn(4, 3, *target, generator=generator), []
    for quick in (True, False):
        made = Resize(source, target, RECIPES["torchvision"][0], resample)
        for one in made._passes if not quick else ():
            one._library, one._narrow = None, False
        out = made.exact(levels)
        found.append((out, torch.autograd.grad((out * weights).sum(), levels)[0]))
    assert all(map(torch.equal, *found))


def test_sums_are_narrow_where_they_fit_and_the_matrix_precision_is_whole(generator):
    kinds, precision = [], torch.get_float32_matmul_precision()
    levels = torch.randint(0, 256, (1, 3, 60, 90), generator=generator).float()
    for target, setting in (((60, 95), "highest"), ((60, 95), "medium"), ((60, 20), "highest")):
        (one,) = Resize((60, 90), target, RECIPES["torchvision"][0], 3)._passes
        torch.set_float32_matmul_precision(setting)
        kinds.append(next(one.sums(levels)).dtype)
        torch.set_float32_matmul_precision(precision)
    assert kinds == [torch.float32, torch.float64, torch.float64]


def test_views_that_begin_alike_share_their_steps(monkeypatch):
    calls: list[tuple] = []
    exact = Resize.exact
    monkeypatch.setattr(Resize, "exact", lambda one, levels: calls.append(levels.shape) or exact(one, levels))
    views = Views([[resize(20, 20)], [resize(20, 20), resize(10, 10)], []], (30, 30), "torchvision")
    assert [tuple(view.shape[2:]) for view in views.exact(torch.zeros(1, 3, 30, 30))] == [(20, 20), (10, 10), (30, 30)]
    assert len(calls) == 2


def test_a_crop_or_a_pad_that_does_not_fit_is_refused(pil_processor):
    for step in (crop(0, 60, 42, 42), pad(0, 0, 42, 42), crop(-1, 0, 42, 42)):
        with pytest.raises(ValueError, match="must fit a picture of \\(42, 84\\)"):
            ExactPreprocessing(pil_processor, (42, 84), Plan([[step]], lambda views: views[0]))


def test_a_plan_of_another_shape_is_refused(pil_processor):
    with pytest.raises(ValueError, match="it does not follow the plan"):
        ExactPreprocessing(pil_processor, (42, 84), Plan([[resize(42, 42)]], lambda views: views[0]))


def test_tiles_are_cut_row_by_row():
    view = torch.arange(24.0).view(1, 1, 4, 6).expand(1, 3, 4, 6)
    cut = tiles(view, 2, 3)
    assert cut.shape == (1, 4, 3, 2, 3)
    assert torch.equal(cut[0, 1, 0], view[0, 0, :2, 3:]) and torch.equal(cut[0, 2, 0], view[0, 0, 2:, :3])
