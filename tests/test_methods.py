"""The methods on attention edits, each against its formula on eager maps: diffusers' UNet and
scheduler, loops in plain PyTorch (oracle_methods.py). The bar is 1e-4 of the latents."""

import numpy as np
import oracle_methods as oracle
import p2p_model
import pytest
import tiny
import torch
import torch.nn.functional as F
from oracle import difference, return_latents
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import minisd
from minisd.editing.diffedit import difference_mask
from minisd.editing.long_prompts import encode, parse, weighted

SOURCE, TARGET = "a cat on my mat", "a sad dog on my mat"
STEPS, GUIDANCE, BAR = 5, 7.5, 1e-4
HOW = {"steps": STEPS, "sampler": "ddim", "seed": 3, "progress": False}
UNCOND_AND_COND = lambda u, c: u + GUIDANCE * (c - u)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return p2p_model.load(tmp_path_factory.mktemp("methods"))


@pytest.fixture(params=["sdpa", pytest.param("reference", marks=pytest.mark.full)])
def both(request, pair, monkeypatch):
    """(diffusers' UNet, minisd's model, whose methods return latents)."""
    reference, sd = pair
    sd.unet.attention = request.param
    return_latents(sd, monkeypatch)
    return reference, sd


@pytest.fixture
def compare(record_property):
    """compare(method, ours, theirs, plain): within the bar, and what it does is more than that."""

    def check(method, ours, theirs, plain=None):
        error = difference(ours, theirs)
        record_property(f"{method} against its formula, relative", error)
        assert error <= BAR
        assert plain is None or difference(plain, theirs) > 10 * BAR

    return check


def image():
    values = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((32, 32), Image.Resampling.BICUBIC)


def texts(sd, prompts):
    """Unconditional rows, then those of the prompts."""
    cond = sd.encode_prompt(prompts)
    return torch.cat([sd.encode_prompt([""]).expand_as(cond), cond])


def run(reference, x, context, attend, combine=UNCOND_AND_COND, **how):
    return oracle.run(reference, tiny.SCHEDULER, x, context, STEPS, attend, combine, **how)


def plainly(i, site, q, k, v):
    return oracle.plain(q, k, v)


def test_masactrl(both, compare):
    reference, sd = both
    ours = minisd.masactrl(sd, SOURCE, TARGET, start=1, **HOW)

    def attend(i, site, q, k, v):
        late = site.startswith(("up_blocks.0.attentions.1", "up_blocks.1"))  # self sites 4, 5, 6
        if not (late and site.endswith("attn1") and i >= 1):
            return oracle.plain(q, k, v)
        out = []
        for source, target in ((0, 1), (2, 3)):  # of the uncond rows, of the cond rows
            out.append(oracle.plain(q[source], k[source], v[source]))
            out.append(oracle.plain(q[target], k[source], v[source]))
        return torch.stack(out)

    x, context = sd.noise(3).repeat(2, 1, 1, 1), texts(sd, [SOURCE, TARGET])
    theirs = run(reference, x, context, attend)
    compare("MasaCtrl", ours, theirs, minisd.seed_baseline(sd, SOURCE, TARGET, **HOW))


def test_masactrl_without_guidance_and_of_several_images(both):
    _, sd = both
    for guidance in (1.0, 3.0):
        how = HOW | {"guidance": guidance}
        two = minisd.masactrl(sd, SOURCE, TARGET, start=1, num_images=2, **how)
        for i in range(2):
            one = minisd.masactrl(sd, SOURCE, TARGET, start=1, **how | {"seed": 3 + i})
            assert difference(two[i::2], one) <= 1e-5
    with pytest.raises(ValueError, match="got no target"):
        minisd.masactrl(sd, SOURCE)
    with pytest.raises(ValueError, match="first is 7, expected a whole number from 0 to 6"):
        minisd.masactrl(sd, SOURCE, TARGET, first=7)


def test_style_aligned(both, compare):
    reference, sd = both
    ours = minisd.style_aligned(sd, SOURCE, TARGET, **HOW)

    def moved(x, like):
        """(H, N, D): by head and channel, the mean and deviation over positions of `like`."""
        out = torch.empty_like(x)
        for head in range(x.shape[0]):
            for channel in range(x.shape[2]):
                own, other = x[head, :, channel], like[head, :, channel]
                scaled = (own - own.mean()) / (own.var() + 1e-5).sqrt()
                out[head, :, channel] = scaled * (other.var() + 1e-5).sqrt() + other.mean()
        return out

    def attend(i, site, q, k, v):
        if site.endswith("attn2"):
            return oracle.plain(q, k, v)
        out = []
        for first, second in ((0, 1), (2, 3)):  # of the uncond rows, of the cond rows
            out.append(oracle.plain(q[first], k[first], v[first]))
            keys = torch.cat([k[first], moved(k[second], k[first])], dim=1)
            values = torch.cat([v[first], v[second]], dim=1)
            out.append(oracle.plain(moved(q[second], q[first]), keys, values))
        return torch.stack(out)

    theirs = run(reference, sd.noise(3, 2), texts(sd, [SOURCE, TARGET]), attend)
    compare("StyleAligned", ours, theirs, sd.txt2img([SOURCE, TARGET], **HOW))
    two = minisd.style_aligned(sd, SOURCE, TARGET, num_images=2, **HOW)
    seeds = {"seed": [3, 5]}  # of rows 0 and 2
    assert difference(two[::2], minisd.style_aligned(sd, SOURCE, TARGET, **HOW | seeds)) <= 1e-5
    with pytest.raises(ValueError, match="got no prompt beside the reference"):
        minisd.style_aligned(sd, SOURCE)


def test_daam(both, compare):
    reference, sd = both
    _, maps = minisd.heatmap(sd, SOURCE, height=24, width=44, **HOW)
    ours = minisd.daam(maps)
    total = torch.zeros(77, 6, 11)

    def attend(i, site, q, k, v):
        P = oracle.softmax_map(q, k)
        if site.endswith("attn2"):
            h, w = {66: (6, 11), 18: (3, 6)}[P.shape[2]]
            for head in P[1]:  # of the conditional row: (N, 77)
                total.add_(F.interpolate(head.T.reshape(1, 77, h, w), (6, 11), mode="bicubic")[0])
        return P @ v

    run(reference, sd.noise(3, 1, 24, 44), texts(sd, [SOURCE]), attend)
    total = total.clamp(min=0)
    compare("DAAM", ours.mean()[0].permute(2, 0, 1), total)
    assert difference(ours.word("cat"), total[2:5].mean(0)) <= BAR
    assert maps.count == STEPS and len(maps.sums) == 7  # as they were


def test_diffedit(both, compare):
    reference, sd = both
    how = {"steps": STEPS, "seed": 3, "progress": False}
    ours = minisd.diffedit(sd, image(), SOURCE, TARGET, noises=3, strength=0.6, **how)
    scheduler = oracle.ddim(tiny.SCHEDULER, STEPS)
    abar, z = scheduler.alphas_cumprod, sd.encode_image(image())
    source, target = sd.encode_prompt([SOURCE, TARGET]).split(1)

    def eps(x, t, text):
        with torch.no_grad():
            return reference(x, torch.tensor(t), encoder_hidden_states=text).sample

    oracle.watch(reference, lambda site, q, k, v: oracle.plain(q, k, v))
    d = torch.zeros(1, 1, 8, 8)
    for seed in (3, 4, 5):
        x = abar[501] ** 0.5 * z + (1 - abar[501]) ** 0.5 * sd.noise(seed)
        apart = (eps(x, 501, target) - eps(x, 501, source)).abs()
        d = d + apart.mean(1, keepdim=True) / 3
    clipped = torch.minimum(d, 3 * d.mean())
    mask = clipped / clipped.max() > 0.5
    found = difference_mask(sd, z, SOURCE, TARGET, noises=3, seed=3)
    assert torch.equal(found, mask) and 0 < mask.sum() < 64

    path, x = [z], z
    for t in (1, 201, 401):
        now, after = abar[max(t - 200, 0)], abar[t]  # of timestep 0 the image itself
        e = eps(x, t, source)
        x = after**0.5 * (x - (1 - now) ** 0.5 * e) / now**0.5 + (1 - after) ** 0.5 * e
        path.insert(0, x)
    uncond = sd.encode_prompt([""])
    for i, t in enumerate((401, 201, 1)):
        u, c = eps(x, t, uncond), eps(x, t, target)
        x = scheduler.step(UNCOND_AND_COND(u, c), t, x).prev_sample
        x = torch.where(mask, x, path[i + 1])
    compare("DiffEdit", ours, x)
    assert (ours - z)[~mask.expand_as(ours)].abs().max() <= 1e-4  # the inverted latent, to the end
    assert (ours - z)[mask.expand_as(ours)].abs().max() > 0.1


def half(side, right=False):
    mask = np.zeros((side, side), bool)
    mask[:, side // 2 :] = right
    mask[:, : side // 2] = not right
    return mask


def test_regional(both, compare):
    reference, sd = both
    regions = {"a cat": half(32), "a dog": half(32, right=True)}
    regions["my mat"] = np.pad(np.ones((4, 4), bool), ((0, 28), (28, 0)))
    ours = minisd.regional(sd, SOURCE, regions, **HOW)

    def attend(i, site, q, k, v):
        if site.endswith("attn1"):
            return oracle.plain(q, k, v)
        s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        side = int(s.shape[2] ** 0.5)
        for n in range(s.shape[2]):
            row, column = divmod(n, side)
            inside = (column < side // 2, column >= side // 2, (row, column) == (0, side - 1))
            for region, seen in enumerate(inside, 1):
                if not seen:
                    s[1, :, n, 77 * region : 77 * (region + 1)] = -1e9  # of the conditional row
        return s.softmax(-1) @ v

    parts = sd.encode_prompt([SOURCE, *regions])
    uncond = sd.encode_prompt([""]).repeat(1, 4, 1)
    context = torch.cat([uncond, parts.reshape(1, 4 * 77, -1)])
    theirs = run(reference, sd.noise(3), context, attend)
    compare("regional prompts", ours, theirs, sd.txt2img(SOURCE, **HOW))
    # Without the unconditional text's repetitions it is the same.
    alone = run(reference, sd.noise(3), texts(sd, [SOURCE]), plainly, lambda u, c: u)
    again = run(reference, sd.noise(3), torch.cat([uncond, uncond]), plainly, lambda u, c: u)
    assert difference(again, alone) <= 1e-5


def test_regional_refuses(both):
    _, sd = both
    with pytest.raises(ValueError, match="got no region, expected at least one"):
        minisd.regional(sd, SOURCE, {})
    thin = np.pad(np.ones((1, 1), bool), ((1, 30), (1, 30)))
    with pytest.raises(ValueError, match="too thin"):
        minisd.regional(sd, SOURCE, {"a": thin})


LONG = "a (cat:1.5) on my mat, " + "mat " * 20 + "and a (dog:0.5)"


def test_parse():
    weights = [1.0] * 2 + [1.5] * 3 + [1.0] * 4 + [2.0] * 6  # of each character
    assert parse("a (cat:1.5) on (my mat: 2)") == ("a cat on my mat", weights)
    assert parse("a (cat) at 10:30 (:3)") == ("a (cat) at 10:30 ", [1.0] * 17)
    with pytest.raises(ValueError, match=r"got the weight '\(cat:1.2.3\)', expected \(word:1.3\)"):
        parse("a (cat:1.2.3)")


def states(sd):
    """The chunks of LONG by hand: every character but spaces is a token."""
    text = LONG.replace("(", "").replace(")", "").replace(":1.5", "").replace(":0.5", "")
    tokens = [sd.tokenizer.vocab[c + "</w>" if last else c] for c, last in spelled(text)]
    assert 75 < len(tokens) <= 150
    weights = [1.0] * len(tokens)
    weights[1:4], weights[-3:] = [1.5] * 3, [0.5] * 3
    rows, each = [], []
    for i in (0, 75):
        ids, own = tokens[i : i + 75], weights[i : i + 75]
        pads = 75 - len(ids)
        rows.append([sd.tokenizer.bos_id, *ids] + [sd.tokenizer.eos_id] * (1 + pads))
        each += [1.0, *own] + [1.0] * (1 + pads)
    return torch.cat(list(sd.text_encoder(torch.tensor(rows)))), torch.tensor(each)


def spelled(text):
    """(character, whether it ends a word) for all but spaces; the comma is a word."""
    for i, c in enumerate(text):
        after = text[i + 1] if i + 1 < len(text) else " "
        if c != " ":
            yield c, after in " ,"


@pytest.mark.parametrize("weights", ["embedding", "bias"])
def test_long_prompts(both, compare, weights):
    reference, sd = both
    with torch.no_grad():
        cond, w = states(sd)
        empty = sd.encode_prompt([""])[0]
    uncond = torch.cat([empty, empty])
    ours = minisd.long_prompt(sd, LONG, weights, **HOW)
    factors = torch.stack([torch.ones(154), w])  # of the two rows
    if weights == "embedding":
        new = cond.double() * w[:, None]
        cond = (new * (cond.double().mean() / new.mean())).float()
        factors = torch.ones(2, 154)

    def attend(i, site, q, k, v):
        if site.endswith("attn1"):
            return oracle.plain(q, k, v)
        s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        e = (s - s.amax(-1, keepdim=True)).exp() * factors[:, None, None]
        return e / e.sum(-1, keepdim=True) @ v

    theirs = run(reference, sd.noise(3), torch.stack([uncond, cond]), attend)
    name = "long prompts" if weights == "embedding" else "weights as a bias"
    compare(name, ours, theirs, minisd.long_prompt(sd, parse(LONG)[0], weights, **HOW))


def test_short_prompts_are_as_ever(both):
    _, sd = both
    for weights in ("embedding", "bias"):
        ours = minisd.long_prompt(sd, [SOURCE, TARGET], weights, negative_prompt="bad", **HOW)
        plain = sd.txt2img([SOURCE, TARGET], negative_prompt="bad", **HOW)
        assert difference(ours, plain) <= 1e-5
    few, weights = encode(sd, ["a " * 76, "a"])
    assert few.shape[:2] == weights.shape == (2, 154)
    assert torch.equal(weighted(few, weights), few)


def test_weights_of_the_negative_prompt_act_on_its_rows(both):
    _, sd = both
    drawn = [
        minisd.long_prompt(sd, SOURCE, weights, negative_prompt=negative, **HOW)
        for weights in ("embedding", "bias")
        for negative in ("a dog", "a (dog:3)")
    ]
    assert difference(drawn[1], drawn[0]) > 0.01 and difference(drawn[3], drawn[2]) > 0.01
    with pytest.raises(ValueError, match="a weight is -1, expected more than 0 for a bias"):
        minisd.long_prompt(sd, "a (cat:-1)", "bias", **HOW)
    with pytest.raises(ValueError, match="weights is 'mean', expected one of"):
        minisd.long_prompt(sd, "a", "mean")


@pytest.mark.parametrize("scale, goal", [(20.0, 0.98), (3.0, 0.9)])
def test_attend_and_excite(both, compare, monkeypatch, scale, goal):
    from minisd.editing import attend_and_excite as module

    reference, sd = both
    goals = {0.0: goal, 0.2: goal - 0.02, 0.4: goal - 0.04}  # which a random model can reach
    monkeypatch.setattr(module, "REFINED", goals)
    how = HOW | {"guidance": GUIDANCE}
    ours = minisd.attend_and_excite(sd, SOURCE, ["cat", "mat"], scale=scale, refinements=3, **how)
    words, saved = ([2, 3, 4], [9, 10, 11]), []
    cond = sd.encode_prompt([SOURCE])

    def attend(i, site, q, k, v):
        P = oracle.softmax_map(q, k)
        if site.endswith("attn2") and P.shape[2] == 16 and not site.startswith("mid"):
            saved.append(P)
        return P @ v

    def loss_of(x, t):
        saved.clear()
        reference(x, t, encoder_hidden_states=cond)
        A = torch.stack(saved).mean((0, 1, 2))  # sites, row, heads -> (16, 77)
        B = torch.softmax(100 * A[:, 1:76], dim=1)
        losses = []
        for tokens in words:
            map = sum(B[:, i - 1] for i in tokens).reshape(4, 4) / len(tokens)
            big = F.pad(map[None, None], (1, 1, 1, 1), mode="reflect")[0, 0]
            weights = torch.tensor([[-1.0, 0, 1]]).square()
            weights = torch.exp(-(weights + weights.T) / 0.5)
            weights = weights / weights.sum()
            smooth = [
                (big[r : r + 3, c : c + 3] * weights).sum() for r in range(4) for c in range(4)
            ]
            losses.append(1 - torch.stack(smooth).max())
        return torch.stack(losses).max()

    def before(i, t, x):
        if i >= 2:  # half of 5
            return x
        move = scale * (1 - 0.5 * i / 4) ** 0.5
        goal = goals[{0: 0.0, 1: 0.2}[i]]
        for last in (False, False, False, True):
            x = x.detach().requires_grad_()
            loss = loss_of(x, t)
            (gradient,) = torch.autograd.grad(loss, x)
            if last or loss <= goal:
                break
            x = x - move * gradient
        return (x - move * gradient).detach()

    theirs = run(reference, sd.noise(3), texts(sd, [SOURCE]), attend, before=before)
    compare("Attend-and-Excite", ours, theirs, sd.txt2img(SOURCE, **how))


def test_attend_and_excite_of_several_images(both):
    """Each has its own loss, and is refined by itself."""
    _, sd = both
    how = HOW | {"refinements": 2}
    two = minisd.attend_and_excite(sd, SOURCE, ["cat"], num_images=2, **how)
    for i in range(2):
        one = minisd.attend_and_excite(sd, SOURCE, ["cat"], **how | {"seed": 3 + i})
        assert difference(two[i : i + 1], one) <= 1e-4
    with pytest.raises(ValueError, match="'bird' is not in the prompt"):
        minisd.attend_and_excite(sd, SOURCE, ["bird"])
    with pytest.raises(ValueError, match="the word '' is not in the prompt, expected one of 'a'"):
        minisd.attend_and_excite(sd, SOURCE, [])
    assert torch.equal(
        minisd.attend_and_excite(sd, SOURCE, ["cat"], until=0.0, **HOW), sd.txt2img(SOURCE, **HOW)
    )


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.found = max(self.found, x.numel())
        return out


def at_4096_positions(sd):
    """One step of an image of 64 x 64 latents; the other methods' are in test_feature_methods."""
    how = {"height": 256, "width": 256, "steps": 1, "progress": False}
    given = image().resize((256, 256))
    return {
        "PAG": lambda: sd.txt2img(SOURCE, rule=minisd.pag, **how),
        "MasaCtrl": lambda: minisd.masactrl(sd, SOURCE, TARGET, start=0, first=0, **how),
        "StyleAligned": lambda: minisd.style_aligned(sd, SOURCE, TARGET, **how),
        "Attend-and-Excite": lambda: minisd.attend_and_excite(sd, SOURCE, "cat", until=1.0, **how),
        "DiffEdit": lambda: minisd.diffedit(
            sd, given, SOURCE, TARGET, strength=1.0, noises=1, steps=1, progress=False
        ),
        "regional": lambda: minisd.regional(sd, SOURCE, {"a cat": half(256)}, **how),
        "long": lambda: minisd.long_prompt(sd, LONG, "bias", **how),
        "DAAM": lambda: minisd.daam(minisd.heatmap(sd, SOURCE, **how)[1]),
    }


@pytest.mark.parametrize("name", list(at_4096_positions(None)))
def test_no_method_forms_a_map_of_all_positions(pair, monkeypatch, name):
    """4096 x 4096 elements would be one head's; reference attention, which forms them, is seen."""
    _, sd = pair
    return_latents(sd, monkeypatch)
    sd.unet.attention = "sdpa"
    with Largest() as largest:
        at_4096_positions(sd)[name]()
    assert largest.found < 4096**2
    if name == "PAG":
        sd.unet.attention = "reference"
        with Largest() as largest:
            at_4096_positions(sd)[name]()
        assert largest.found >= 4096**2
