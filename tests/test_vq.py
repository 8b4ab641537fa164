"""The VQ autoencoder equals diffusers' VQModel on random weights; its gradient goes straight
through; its objective is the formula; perplexity counts what is used."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel as ReferenceVQ
from oracle import difference, load
from tiny import randomise

from minisd import VQConfig, VQModel
from minisd.models.vq import perplexity
from minisd.training.objective import vq_loss

BAR = 2e-6
CONFIGS = {
    "depth 3": dict(block_out_channels=(8, 16, 24), layers_per_block=2, norm_num_groups=8),
    "own width of the codebook": dict(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        vq_embed_dim=6,
        num_vq_embeddings=37,
    ),
}


def pair(**config):
    depth = len(config["block_out_channels"])
    blocks = dict(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
    )
    reference = randomise(ReferenceVQ(**blocks, **config), 0)
    return reference, load(VQModel(VQConfig.from_dict(dict(reference.config))), reference)


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equals_diffusers(name, record_property):
    reference, vq = pair(**CONFIGS[name])
    x, z = randn(2, 3, 24, 40), randn(2, vq.config.dim, 5, 3)
    z_q, ids = vq.quantize(z)
    expected_q, _, (_, _, expected_ids) = reference.quantize(z)
    assert torch.equal(ids.flatten(), expected_ids)
    error = max(
        difference(vq.encode(x), reference.encode(x).latents),
        difference(z_q, expected_q),
        difference(vq.decode(z), reference.decode(z).sample),
        difference(vq.decode(z, quantise=False), reference.decode(z, True).sample),
        difference(vq.decode(vq.encode(x)), reference(x).sample),
    )
    record_property("VQ autoencoder, tiny", error)
    assert error <= BAR


def test_the_nearest_row_of_all():
    _, vq = pair(**CONFIGS["own width of the codebook"])
    z = randn(2, 6, 3, 4)
    z_q, ids = vq.quantize(z)
    table = vq.quantize.embedding.weight
    for b in range(2):
        for y in range(3):
            for x in range(4):
                distances = ((table - z[b, :, y, x]) ** 2).sum(1)
                assert ids[b, y, x] == distances.argmin()
                assert torch.equal(z_q[b, :, y, x], table[ids[b, y, x]])


def test_gradients_go_straight_through():
    """To z as if z_q were z; to the codebook by its own term alone."""
    _, vq = pair(**CONFIGS["own width of the codebook"])
    z = randn(1, 6, 3, 4).requires_grad_()
    weight = randn(1, 3, 6, 8)
    (through,) = torch.autograd.grad((vq.decode(z) * weight).sum(), z)
    z_q = vq.quantize(z)[0].detach().requires_grad_()
    (at_z_q,) = torch.autograd.grad((vq.decode(z_q, quantise=False) * weight).sum(), z_q)
    torch.testing.assert_close(through, at_z_q)
    assert through.abs().max() > 0


def test_the_objective_is_the_formula():
    reference, vq = pair(**CONFIGS["own width of the codebook"])
    x = randn(2, 3, 8, 12)
    loss, ids = vq_loss(vq, x, beta=0.25)
    z = vq.encode(x)
    table = vq.quantize.embedding.weight
    distance = ((table[ids] - z.permute(0, 2, 3, 1)) ** 2).mean()
    image = vq.decode(table[ids].permute(0, 3, 1, 2), quantise=False)
    torch.testing.assert_close(loss, (image - x).abs().mean() + 1.25 * distance)
    # beta is on the encoder's side; diffusers' legacy form has it on the codebook's.
    names = ["quant_conv.weight", "quantize.embedding.weight"]
    parameters = dict(vq.named_parameters())
    zeros = loss - F.l1_loss(vq.decode(z), x)
    ours = torch.autograd.grad(zeros, [parameters[name] for name in names])
    reference.quantize.legacy = False
    _, theirs, _ = reference.quantize(reference.encode(x).latents)
    own = dict(reference.named_parameters())
    for a, b in zip(ours, torch.autograd.grad(theirs, [own[name] for name in names])):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_perplexity():
    assert perplexity(torch.zeros(3, 4, 4, dtype=torch.int64), 16).item() == pytest.approx(1)
    assert perplexity(torch.arange(16).reshape(1, 4, 4), 16).item() == pytest.approx(16)
    half = torch.tensor([[[0, 1, 1, 1]]])
    assert perplexity(half, 9).item() == pytest.approx(4 * 3**-0.75)


def test_it_learns(record_property):
    """80 steps on four flat images: the error falls to a third, and several rows are in use."""
    torch.manual_seed(0)
    vq = VQModel(VQConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4))
    vq.quantize = type(vq.quantize)(16, 3)
    x = torch.tensor([-0.8, -0.2, 0.4, 0.9])[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    optimizer = torch.optim.AdamW(vq.parameters(), 5e-3)
    errors = []
    for _ in range(80):
        loss, ids = vq_loss(vq, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(F.l1_loss(vq.decode(vq.encode(x)).detach(), x).item())
    used = perplexity(ids, 16).item()
    record_property("VQ autoencoder, rows in use of 16", used)
    assert min(errors[-20:]) < errors[0] / 3 and used > 1.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm_type": "spatial"}, "norm_type: got 'spatial', supported is 'group'"),
        ({"lookup_from_codebook": True}, "lookup_from_codebook: got True"),
        ({"num_vq_embeddings": "many"}, "num_vq_embeddings: got 'many', expected int"),
    ],
)
def test_configs_are_read_strictly(values, message):
    with pytest.raises(ValueError, match=message):
        VQConfig.from_dict(values)


def test_defaults_are_diffusers_and_a_new_codebook_is_spread():
    """What a config.json leaves out; rows of a new codebook uniform in +- 1 / rows."""
    own, theirs = VQConfig.from_dict({}), ReferenceVQ().config
    for name in ("num_vq_embeddings", "block_out_channels", "layers_per_block", "latent_channels"):
        assert getattr(own, name) == getattr(theirs, name), name
    table = VQModel(VQConfig.from_dict({"num_vq_embeddings": 500})).quantize.embedding.weight
    assert table.abs().max() <= 1 / 500 and table.min() < -0.9 / 500 and table.max() > 0.9 / 500


def test_bad_shapes():
    _, vq = pair(**CONFIGS["depth 3"])
    with pytest.raises(ValueError, match=r"latents: got \(1, 4, 2, 2\), expected a tensor \(B, 3"):
        vq.decode(randn(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"image: got \(1, 4, 8, 8\)"):
        vq.encode(randn(1, 4, 8, 8))
