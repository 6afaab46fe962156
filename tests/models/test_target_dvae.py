"""The discrete VAE: DALL-E's architecture and outputs, the loss by its formula, and tokenizer files."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from mae_fast.errors import UserError
from mae_fast.models.targets.dvae import DVAE, STEP, Tokenizer
from mae_fast.training.tasks.dvae import load_tokenizer

SIZES = {"vocab_size": 24, "hidden": 8, "groups": 3, "blocks_per_group": 2, "in_chans": 3}


def tokenizer(seed=0, **changes):
    """A small tokenizer with random biases, because biases start at zero."""
    torch.manual_seed(seed)
    return shifted(Tokenizer(**SIZES | changes))


def shifted(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def pixels(n=2, size=(16, 24), seed=0, channels=3):
    return torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(seed))


def by_formula(weights, x, groups, blocks):
    """The forward pass of the published encoder, from a state dict."""

    def conv(name, y):
        w = weights[f"{name}.w"]
        return F.conv2d(y, w, weights[f"{name}.b"], padding=w.shape[-1] // 2)

    x = conv("blocks.input", 0.8 * x + 0.1)
    for g in range(1, groups + 1):
        for b in range(1, blocks + 1):
            name = f"blocks.group_{g}.block_{b}"
            y = x
            for i in range(1, 5):
                y = conv(f"{name}.res_path.conv_{i}", y.clamp(min=0))
            short = conv(f"{name}.id_path", x) if f"{name}.id_path.w" in weights else x
            x = short + y / (groups * blocks) ** 2
        if g < groups:
            n, c, h, w = x.shape
            x = x.reshape(n, c, h // 2, 2, w // 2, 2).amax((3, 5))
    return conv("blocks.output.conv", x.clamp(min=0))


@pytest.mark.parametrize(("groups", "blocks"), [(3, 2), (4, 1), (1, 1)])
def test_logits_equal_the_formula(groups, blocks):
    model = tokenizer(groups=groups, blocks_per_group=blocks).double()
    x = pixels(size=(16, 24)).double()
    logits = model(x)
    assert logits.shape == (2, 24, 16 // model.factor, 24 // model.factor)
    torch.testing.assert_close(logits, by_formula(model.state_dict(), x, groups, blocks), rtol=0, atol=1e-12)


def test_logits_and_names_equal_the_published_package():
    import dall_e as published

    torch.manual_seed(0)
    encoder = shifted(published.Encoder(n_hid=64, vocab_size=512))
    x = pixels(size=(32, 48))
    ours = Tokenizer(vocab_size=512, hidden=64)
    ours.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        got, expected = ours(x), encoder(published.map_pixels(x))
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()
    decoder = shifted(published.Decoder(n_init=32, n_hid=64, vocab_size=512))
    whole = DVAE(vocab_size=512, hidden=64)
    whole.encoder.load_state_dict(encoder.state_dict())
    whole.decoder.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        made, tokens = whole(x)
        codes = F.one_hot(encoder(published.map_pixels(x)).argmax(1), 512).movedim(3, 1).float()
        expected = published.unmap_pixels(torch.sigmoid(decoder(codes)[:, :3]))
    assert torch.equal(tokens, codes.argmax(1))
    assert (made - expected).abs().max() <= 1e-6


def test_defaults_are_the_published_sizes():
    """Names and shapes of the encoder with 8192 codes, and of its decoder."""
    with torch.device("meta"):
        found = {name: tuple(x.shape) for name, x in DVAE().state_dict().items()}
    expected = {}

    def conv(name, n_out, n_in, kernel):
        expected[f"{name}.w"], expected[f"{name}.b"] = (n_out, n_in, kernel, kernel), (n_out,)

    def groups(part, first, widths, kernels):
        n_in = first
        for g, width in enumerate(widths, 1):
            for b in (1, 2):
                name = f"{part}.blocks.group_{g}.block_{b}"
                inner = [n_in, *[width // 4] * 3, width]
                for i, kernel in enumerate(kernels, 1):
                    conv(f"{name}.res_path.conv_{i}", inner[i], inner[i - 1], kernel)
                if n_in != width:
                    conv(f"{name}.id_path", width, n_in, 1)
                n_in = width

    conv("encoder.blocks.input", 256, 3, 7)
    groups("encoder", 256, (256, 512, 1024, 2048), (3, 3, 3, 1))
    conv("encoder.blocks.output.conv", 8192, 2048, 1)
    conv("decoder.blocks.input", 128, 8192, 1)
    groups("decoder", 128, (2048, 1024, 512, 256), (1, 3, 3, 3))
    conv("decoder.blocks.output.conv", 6, 256, 1)
    assert found == expected
    assert sum(math.prod(shape) for name, shape in expected.items() if name.startswith("encoder.")) == 53_786_240


def test_config_builds_the_same_tokenizer():
    model = tokenizer(groups=2, in_chans=1)
    again = Tokenizer(**model.config)
    again.load_state_dict(model.state_dict())
    assert again.config == model.config == SIZES | {"groups": 2, "in_chans": 1}
    assert again.factor == 2


def test_tokens_are_in_row_major_order():
    """The token of each cell equals that of an image in the colour of the cell."""
    model = tokenizer()
    x = pixels(n=3, size=(8, 12))
    tokens = model.tokens(x, (2, 3))
    assert (tokens.shape, tokens.dtype) == ((3, 6), torch.int64)
    logits = model(x)
    for row in range(2):
        for column in range(3):
            assert torch.equal(tokens[:, 3 * row + column], logits[:, :, row, column].argmax(1))
    assert len(tokens.unique()) > 3


@pytest.mark.parametrize(("size", "matters"), [((30, 23), "antialias"), ((7, 5), "clamp")])
def test_pixels_of_other_sizes_are_resized(size, matters):
    model = tokenizer()
    x = (pixels(n=40, size=size) > 0.5).float()  # at edges, the bicubic filter leaves 0..1

    def tokens(antialias=True, clamp=True):
        resized = F.interpolate(x, (16, 12), mode="bicubic", antialias=antialias)
        return model(resized.clamp(0, 1) if clamp else resized).argmax(1).flatten(1)

    assert torch.equal(model.tokens(x, (4, 3)), tokens())
    assert not torch.equal(tokens(), tokens(**{matters: False})), "the option makes no difference for these images"


def test_tokens_ignore_autograd_and_autocast():
    model = tokenizer()
    x = pixels(n=8).requires_grad_()
    seen = []
    model.blocks.input.register_forward_hook(lambda _module, _inputs, y: seen.append((y.dtype, y.requires_grad)))
    expected = model.tokens(x, (4, 6))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.tokens(x.bfloat16().float(), (4, 6)), model.tokens(x.bfloat16(), (4, 6)))
        assert torch.equal(model.tokens(x, (4, 6)), expected)
    assert set(seen) == {(torch.float32, False)}


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 4, 8, 8), (3, 8, 8)])
def test_wrong_pixels_raise_value_errors(shape):
    with pytest.raises(ValueError, match=r"pixels must be \[N, 3, H, W\]"):
        tokenizer()(torch.zeros(shape))


@pytest.mark.parametrize("changes", [{"hidden": 6}, {"groups": 0}, {"vocab_size": 0}, {"in_chans": -1}])
def test_impossible_sizes_raise_value_errors(changes):
    with pytest.raises(ValueError, match="sizes must be positive, and hidden a multiple of 4"):
        tokenizer(**changes)


# Loss


def dvae(seed=0, **changes):
    torch.manual_seed(seed)
    return shifted(DVAE(**SIZES | changes))


@pytest.mark.parametrize(("temperature", "kl_weight"), [(1.0, 0.0), (0.3, 2.5)])
def test_dvae_loss_equals_the_formula(temperature, kl_weight):
    """Noise, relaxation, likelihood and divergence follow the paper."""
    model = dvae().double().requires_grad_(False)
    x = pixels(size=(8, 12)).double()
    torch.manual_seed(5)
    got = model.loss(x, temperature, kl_weight)
    torch.manual_seed(5)
    logits = model.encoder(x)
    gumbel = -torch.empty_like(logits).exponential_().log()
    codes = ((logits + gumbel) / temperature).exp()
    codes = codes / codes.sum(1, keepdim=True)
    values = model.decoder(codes)
    mean, scale = values[:, :3], values[:, 3:].exp() + STEP
    y = 0.8 * x + 0.1
    density = (-((y / (1 - y)).log() - mean).abs() / scale).exp() / (2 * scale * y * (1 - y))
    q = logits.softmax(1)
    kl = (q * (q * q.shape[1]).log()).sum(1)  # of each token
    expected = -density.log().mean() + kl_weight * kl.sum() / x.numel()
    assert float(got) == pytest.approx(float(expected), rel=1e-12)


def test_the_likelihood_is_a_density():
    """For images of one pixel and one channel, it integrates to 1 over the range that pixels are mapped to."""
    model = dvae(vocab_size=2, groups=1, in_chans=1).double()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
        model.decoder.blocks.output.conv.b[:] = torch.tensor([0.4, -0.5])
        places = torch.linspace(-12, 12, 1001, dtype=torch.float64)  # logits of the pixel
        mapped = places.sigmoid()
        each = [float(model.loss(x.reshape(1, 1, 1, 1), 1.0, 0.0)) for x in (mapped - 0.1) / 0.8]
    density = (-torch.tensor(each, dtype=torch.float64)).exp()
    assert float(torch.trapezoid(density, mapped)) == pytest.approx(1, abs=1e-3)


def test_gradients_of_constant_images_stay_bounded():
    """Black images can be predicted exactly. The minimum of the scale bounds the gradients."""
    model = dvae(vocab_size=2, groups=1)
    x = torch.zeros(1, 3, 4, 4)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
        model.decoder.blocks.output.conv.b[:3] = torch.tensor(0.1).logit()
        model.decoder.blocks.output.conv.b[3:] = -200.0
    loss = model.loss(x, 1.0, 0.0)
    assert float(loss) == pytest.approx(math.log(2 * STEP * 0.09), abs=1e-3)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradients_reach_every_weight():
    model = dvae()
    model.loss(pixels(), 0.5, 1.0).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_checkpointed_blocks_give_the_same_gradients():
    found = []
    for on in (False, True):
        model = dvae()
        model.set_grad_checkpointing(on)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            torch.manual_seed(1)
            loss = model.loss(pixels(), 0.5, 1.0)
        loss.backward()
        found.append(([p.grad for p in model.parameters()], sum(saved)))
    (plain, kept), (again, fewer) = found
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert fewer < 0.7 * kept


def test_forward_reconstructs_images_from_their_most_likely_codes():
    model = dvae().requires_grad_(False)
    x = pixels(n=3)
    made, tokens = model(x)
    assert (made.shape, tokens.shape, tokens.dtype) == (x.shape, (3, 4, 6), torch.int64)
    assert torch.equal(tokens.flatten(1), model.encoder.tokens(x, (4, 6)))
    codes = torch.zeros(3, 24, 4, 6).scatter_(1, tokens[:, None], 1.0)
    mean = model.decoder(codes)[:, :3]
    torch.testing.assert_close(made, ((mean.sigmoid() - 0.1) / 0.8).clamp(0, 1))
    with torch.no_grad():
        model.decoder.blocks.output.conv.b[:] = torch.tensor([9.0, -9.0, 0.0, 0.0, 0.0, 0.0])
    assert torch.equal(model(x)[0][:, :2].amin((0, 2, 3)), torch.tensor([1.0, 0.0]))


def test_training_steps_lower_the_dvae_loss():
    model = dvae()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.loss(pixels() ** 4, 0.5, 1.0)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.15


# Files


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize("prefix", ["", "encoder.", "module.encoder."])
@pytest.mark.parametrize("changes", [{}, {"groups": 1, "in_chans": 1, "blocks_per_group": 3}], ids=["rgb", "grey"])
def test_tokenizer_files_of_all_kinds_load(tmp_path, name, prefix, changes):
    model = tokenizer(**changes)
    weights = {prefix + key: x.clone() for key, x in model.state_dict().items()}
    save_file(weights, tmp_path / name) if name.endswith("safetensors") else torch.save(weights, tmp_path / name)
    found = load_tokenizer(tmp_path / name)
    assert found.config == model.config
    (tmp_path / name).write_bytes(bytes((tmp_path / name).stat().st_size))  # weights are not memory-mapped
    assert all(torch.equal(x, model.state_dict()[key]) for key, x in found.state_dict().items())
    x = pixels(channels=model.config["in_chans"])
    assert torch.equal(found(x), model(x))


def test_a_dvae_file_and_half_precision_load(tmp_path):
    model = dvae()
    save_file({key: x.half() for key, x in model.state_dict().items()}, tmp_path / "x.safetensors")
    found = load_tokenizer(tmp_path / "x.safetensors")
    for key, x in found.state_dict().items():
        assert torch.equal(x, model.encoder.state_dict()[key].half().float()), key


def test_wrong_weights_raise_an_error_that_names_all_of_them(tmp_path):
    weights = tokenizer().state_dict()
    del weights["blocks.group_2.block_1.id_path.w"], weights["blocks.output.conv.b"]
    weights |= {"strange": torch.zeros(1), "blocks.input.b": torch.zeros(3)}
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path / "x.safetensors")
    for name in ("blocks.group_2.block_1.id_path.w", "blocks.output.conv.b", "strange", "blocks.input.b"):
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_prefix_must_be_shared_by_all_names(tmp_path):
    weights = tokenizer().state_dict()
    save_file({f"encoder.{key}": x for key, x in weights.items()} | {"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r'Unexpected key.*"encoder\.blocks\.input\.w".*"x"'):
        load_tokenizer(tmp_path / "x.safetensors")


@pytest.mark.parametrize("groups", [50, 500])
def test_huge_sizes_in_a_file_allocate_no_memory(tmp_path, groups):
    weights = {"blocks.input.w": torch.zeros(4, 3, 7, 7), "blocks.output.conv.b": torch.zeros(4)}
    weights |= {f"blocks.group_{i + 1}.block_1.x": torch.zeros(1) for i in range(groups)}
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is not a dVAE encoder"):
        load_tokenizer(tmp_path / "x.safetensors")


def test_a_pickled_module_raises_an_error_whose_hint_works(tmp_path, monkeypatch):
    torch.save(nn.Sequential(nn.ReLU()), tmp_path / "encoder.pkl")
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path / "encoder.pkl")
    told = str(caught.value)
    assert "\n" not in told
    assert "has no state dict" in told
    torch.save(tokenizer(), tmp_path / "encoder.pkl")
    line = told[told.index('python -c "') + len('python -c "') : told.rindex('"')]
    monkeypatch.chdir(tmp_path)
    exec(line, {})
    assert load_tokenizer(tmp_path / "encoder.pth").config == SIZES


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors"])
def test_a_missing_tokenizer_file_raises_a_user_error(tmp_path, name):
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_tokenizer(tmp_path / name)
    assert "encoder.pkl" not in str(caught.value)


def test_an_empty_tokenizer_folder_raises_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no usable checkpoint"):
        load_tokenizer(tmp_path)
