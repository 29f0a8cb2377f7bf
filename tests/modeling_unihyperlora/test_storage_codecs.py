"""Each codec against NumPy in float64, and stored values equal to trained values, bit for bit."""

import numpy as np
import pytest
import torch

from modeling_unihyperlora.storage import Grid, Half, RowInteger, StoredTensor, TwoBit, pack, unpack

SHAPES = [(1, 1), (1, 7), (5, 1), (3, 8), (16, 33), (128, 256)]
MAGNITUDES = [1e-42, 1e-38, 1e-30, 1e-7, 1e-3, 1.0, 77.7, 3e4, 1e20, 1e37]
CODECS = {
    "int8": RowInteger(8),
    "int4": RowInteger(4),
    "grid": Grid(0.125),
    "odd grid": Grid(0.1),
    "two bit": TwoBit(1.0),
    "odd two bit": TwoBit(0.1),
    "half": Half(),
}


def sample(shape, magnitude: float, seed: int = 0) -> torch.Tensor:
    """Rows of very different size, the second of zeros, some entries exactly half-way between two codes."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    value *= magnitude * torch.rand(shape[0], 1, generator=generator, dtype=torch.float64)
    value[1:2] = 0
    return value.float()


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 (nearest, ties to even) by arithmetic on the bits."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return rounded.astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("magnitude", [m for m in MAGNITUDES if m >= 1e-30])
@pytest.mark.parametrize("shape", SHAPES)
def test_row_integer_is_the_nearest_multiple_of_the_row_scale(bits, magnitude, shape):
    value = sample(shape, magnitude)
    codec, largest = RowInteger(bits), 2 ** (bits - 1) - 1
    stored = codec.encode(value)
    rows = value.double().numpy()
    scale = bfloat16(np.abs(value.numpy()).max(axis=1, keepdims=True) / np.float32(largest)).astype(np.float64)
    assert stored[".scale"].dtype == torch.bfloat16
    assert np.array_equal(stored[".scale"].double().numpy(), scale)
    codes = unpack(stored[""], value.shape, 4) if bits == 4 else stored[""]
    codes = codes.double().numpy()
    assert np.array_equal(np.abs(codes).max(axis=1), np.where(scale[:, 0] > 0, largest, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        exact = np.clip(np.where(scale > 0, rows / scale, 0), -largest, largest)
    assert np.abs(codes - exact).max() <= 0.5 + 1e-4
    assert np.array_equal(codec.round(value).double().numpy(), codes * scale), "code times scale is not exact"


@pytest.mark.parametrize("step", [0.125, 0.1, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_grid_is_the_nearest_step_and_saturates(step, shape):
    value = sample(shape, 8 * step)
    codes = unpack(Grid(step).encode(value)[""], value.shape, 4).double().numpy()
    exact = np.clip(value.double().numpy() / step, -8, 7)
    assert np.abs(codes - exact).max() <= 0.5 + 1e-5
    np.testing.assert_allclose(Grid(step).round(value).double().numpy(), codes * step, rtol=1e-6)
    extremes = torch.tensor([[-1e9, -8.4 * step, 7.4 * step, 1e9]])
    assert unpack(Grid(step).encode(extremes)[""], extremes.shape, 4).tolist() == [[-8, -8, 7, 7]]


@pytest.mark.parametrize("step", [1.0, 0.1, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_bit_is_the_nearest_of_four_values(step, shape):
    value = sample(shape, 2 * step)
    levels = np.array([-1.5, -0.5, 0.5, 1.5]) * step
    distance = np.abs(value.double().numpy()[..., None] - levels)
    rounded = TwoBit(step).round(value).double().numpy()
    np.testing.assert_allclose(np.abs(rounded - value.double().numpy()), distance.min(axis=-1), atol=1e-5 * step)
    assert set(np.unique((rounded / step).round(3))) <= {-1.5, -0.5, 0.5, 1.5}
    packed = TwoBit(step).encode(value)[""]
    assert packed.dtype == torch.uint8 and packed.numel() == (value.numel() + 3) // 4


@pytest.mark.parametrize("shape", SHAPES)
def test_half_is_ieee_half_precision(shape):
    value = sample(shape, 100.0)
    expected = value.numpy().astype(np.float16)
    assert np.array_equal(Half().encode(value)[""].numpy(), expected)
    assert np.array_equal(Half().round(value).numpy(), expected.astype(np.float32))


@pytest.mark.parametrize(
    "name,magnitude",
    [(n, m) for n in CODECS for m in MAGNITUDES if n != "half" or m < 1e4],  # the saver refuses what half cannot hold
)
@pytest.mark.parametrize("shape", SHAPES)
def test_codecs_are_idempotent_bit_for_bit(name, magnitude, shape):
    codec = CODECS[name]
    for seed in range(5):
        value = sample(shape, magnitude, seed)
        stored = codec.encode(value)
        decoded = codec.decode(stored, value.shape)
        again = codec.encode(decoded)
        assert torch.equal(decoded, codec.round(value)), f"the file holds another value than was trained, seed {seed}"
        assert torch.equal(codec.round(decoded), decoded), f"rounding twice moves the value, seed {seed}"
        assert stored.keys() == again.keys() and all(torch.equal(stored[key], again[key]) for key in stored)
        assert torch.isfinite(decoded).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_of_zeros_stays_zero(bits):
    value = torch.tensor([[0.0, 0.0, -0.0], [1.0, -2.0, 0.5]])
    rounded = RowInteger(bits).round(value)
    assert torch.equal(rounded[0], torch.zeros(3)) and rounded[1].abs().max() > 0


def test_a_large_row_does_not_coarsen_a_small_one():
    value = torch.stack([torch.linspace(-1, 1, 50), 1e6 * torch.linspace(-1, 1, 50)])
    rounded = RowInteger(8).round(value)
    assert (rounded[0] - value[0]).abs().max() <= 0.5 / 127 * 1.01


def test_packing_keeps_every_pair_of_codes():
    codes = torch.cartesian_prod(torch.arange(-8.0, 8), torch.arange(-8.0, 8))  # (256, 2)
    packed = pack(codes, 4)
    assert packed.dtype == torch.uint8 and packed.shape == (256,)
    assert torch.equal(unpack(packed, codes.shape, 4), codes)
    assert packed.unique().numel() == 256, "two pairs share a byte"
    low, high = packed & 15, packed >> 4
    assert torch.equal(torch.stack([low, high], dim=1).float() - 8, codes), "the first code is the low nibble"
    quads = torch.cartesian_prod(*[torch.arange(-2.0, 2)] * 4)  # (256, 4)
    assert pack(quads, 2).unique().numel() == 256 and torch.equal(unpack(pack(quads, 2), quads.shape, 2), quads)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (3,), (7,), (3, 5), (8, 128), (2, 3, 3)])
def test_packing_of_any_size(bits, shape):
    generator = torch.Generator().manual_seed(len(shape))
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator).float()
    packed = pack(codes, bits)
    assert packed.numel() == -(-codes.numel() * bits // 8)
    assert torch.equal(unpack(packed, codes.shape, bits), codes)


@pytest.mark.parametrize("name", CODECS)
def test_gradient_passes_straight_through(name):
    stored = StoredTensor(sample((6, 9), 0.5), CODECS[name])
    weights = torch.randn(6, 9, generator=torch.Generator().manual_seed(3))
    value = stored()
    assert torch.equal(value, CODECS[name].round(stored.latent.detach()))
    assert not torch.equal(value, stored.latent), "nothing was rounded, so this tests nothing"
    (value.square() * weights).sum().backward()
    torch.testing.assert_close(stored.latent.grad, 2 * value.detach() * weights)


@pytest.mark.parametrize("name", CODECS)
def test_stored_tensor_takes_over_what_it_gave(name):
    stored, other = (StoredTensor(sample((6, 9), 0.5, seed), CODECS[name]) for seed in (1, 2))
    other.decode(stored.encode())
    assert torch.equal(other(), stored()) and torch.equal(other.latent, stored())
    assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in stored.encode().values())


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layout_is_what_is_encoded_without_the_values(name, shape):
    tensor = StoredTensor(sample(shape, 1.0), CODECS[name])
    encoded, layout = (
        {key: (x.dtype, x.shape) for key, x in made.items()} for made in (tensor.encode(), tensor.layout())
    )
    assert layout == encoded and all(x.is_meta for x in tensor.layout().values())


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("wants_gradient", [True, False])
def test_rounding_leaves_the_latent_as_it_is(name, wants_gradient):
    value = sample((5, 8), 1.0)
    tensor = StoredTensor(value.clone(), CODECS[name]).requires_grad_(wants_gradient)
    with torch.no_grad():
        plain = tensor()
    assert torch.equal(tensor(), plain) and torch.equal(tensor.latent, value)
    tensor.encode()
    assert torch.equal(tensor.latent, value)


@pytest.mark.parametrize("name", CODECS)
def test_latent_of_lower_precision_still_gives_float32(name):
    stored = StoredTensor(sample((6, 9), 0.5), CODECS[name]).bfloat16()
    value = stored()
    assert value.dtype == torch.float32 and torch.equal(value, CODECS[name].round(stored.latent.detach().float()))
    value.sum().backward()
    assert stored.latent.grad.dtype == torch.bfloat16 and torch.equal(
        stored.latent.grad, torch.ones_like(stored.latent)
    )


def test_value_is_not_an_alias_of_the_latent():
    """A codec that changes nothing must not return the parameter itself."""
    stored = StoredTensor(torch.ones(2, 2), Half())
    value = stored()
    value.detach().zero_()
    assert torch.equal(stored.latent, torch.ones(2, 2))
