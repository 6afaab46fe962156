"""Our models in training loops that are written for the published models. The results match eager torch and timm.

As a script under torchrun, the loops run in several processes.
"""

import inspect
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import assert_close, assert_no_worse_than_eager, one_thread, perturb  # noqa: F401
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import mae_fast as models_mae
import mae_fast as models_vit
from mae_fast.models.reference import ReferenceMAE
from mae_fast.weights.files import load_weights

pytestmark = pytest.mark.usefixtures("one_thread")

ENCODER = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
SMALL = {**ENCODER, "decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2}


def mae(seed=0, name="mae_vit_base_patch16", **options):
    torch.manual_seed(seed)
    return perturb(models_mae.__dict__[name](norm_pix_loss=True, **SMALL, **options))


def world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def batches(size, dtype):
    """48 images with labels, in batches of 8. Each of several processes gets its part."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(48, 3, size, size, generator=generator, dtype=dtype)
    data = TensorDataset(images, torch.arange(48) % 10)
    rank, processes = world()
    return DataLoader(data, batch_size=8 // processes, sampler=DistributedSampler(data, processes, rank, shuffle=False))


def step(scaler, loss, optimizer, parameters, update):
    """Backward pass, and an update every few micro-batches. Returns the gradient norm."""
    scaler.scale(loss).backward(create_graph=False)
    if not update:
        return None
    scaler.unscale_(optimizer)
    norm = torch.stack([p.grad.detach().norm() for p in parameters if p.grad is not None]).norm()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm.item()


def pretrain(model, epochs=2, output=None, resume=None, autocast=False, accum_iter=2):
    """Pre-train ``model`` as the published script does. Returns losses and gradient norms."""
    args = Namespace(lr=1e-3, weight_decay=0.05, mask_ratio=0.75, accum_iter=accum_iter)
    model.to(torch.device("cpu"))
    loader = batches(24, model.cls_token.dtype)
    model_without_ddp = model
    if dist.is_initialized():
        model = DistributedDataParallel(model, find_unused_parameters=True)
        model_without_ddp = model.module
    groups = param_groups_weight_decay(model_without_ddp, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler("cpu")
    start_epoch = 0
    if resume:
        with torch.serialization.safe_globals([Namespace]):
            checkpoint = torch.load(resume, map_location="cpu", weights_only=True)
        model_without_ddp.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        start_epoch = checkpoint["epoch"] + 1
        assert vars(checkpoint["args"]) == vars(args)
    losses, norms = [], []
    for epoch in range(start_epoch, epochs):
        model.train(True)
        optimizer.zero_grad()
        torch.manual_seed(epoch * 10 + world()[0])
        for i, (samples, _) in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = args.lr / (1 + epoch)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss, _, _ = model(samples, mask_ratio=args.mask_ratio)
            losses.append(loss.item())
            loss /= args.accum_iter
            norms.append(step(scaler, loss, optimizer, model.parameters(), (i + 1) % args.accum_iter == 0))
        if output:
            state = {"model": model_without_ddp.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"epoch": epoch, "scaler": scaler.state_dict(), "args": args}
            torch.save(state, output / f"checkpoint-{epoch}.pth")
    return results(losses, norms)


def results(losses, norms):
    return {"losses": torch.tensor(losses), "norms": torch.tensor([norm for norm in norms if norm is not None])}


@pytest.mark.parametrize("accum_iter", [1, 3])
def test_pretraining_matches_eager(accum_iter):
    model = mae()
    eager = ReferenceMAE.of(model)
    before = model.state_dict()["decoder_pred.weight"].clone()
    ours, theirs = pretrain(model, accum_iter=accum_iter), pretrain(eager, accum_iter=accum_iter)
    assert (len(ours["losses"]), len(ours["norms"])) == (12, 12 / accum_iter)
    assert ours["losses"][6:].mean() < ours["losses"][:6].mean()
    assert not torch.equal(model.decoder_pred.weight, before)
    assert_close(ours, theirs, 1e-6)


def test_pretraining_under_autocast():
    model = mae()
    eager, exact = ReferenceMAE.of(model), ReferenceMAE.of(model).double()
    truth = {name: x.double() for name, x in pretrain(exact).items()}
    assert_no_worse_than_eager(pretrain(model, autocast=True), pretrain(eager, autocast=True), truth, torch.bfloat16)


def test_checkpoints_are_interchangeable_with_eager(tmp_path):
    for writer, folder in ((mae(), tmp_path / "ours"), (ReferenceMAE.of(mae()), tmp_path / "eager")):
        folder.mkdir()
        whole = pretrain(writer, output=folder)
        with pytest.raises(pickle.UnpicklingError):  # without the allowance for args
            torch.load(folder / "checkpoint-0.pth", weights_only=True)
        assert_close(load_weights(folder / "checkpoint-1.pth"), writer.state_dict(), 0)
        for reader in (mae(seed=1), ReferenceMAE.of(mae(seed=1))):
            rest = pretrain(reader, resume=folder / "checkpoint-0.pth")
            same = type(reader) is type(writer)
            assert_close(rest, {name: x[len(x) // 2 :] for name, x in whole.items()}, 0 if same else 1e-6)


def test_parameter_groups_of_pretraining():
    model = mae()
    plain, decayed = param_groups_weight_decay(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    decayed = {names[id(p)] for p in decayed["params"]}
    assert {name for name in decayed if not name.endswith(".weight")} == {"cls_token", "mask_token"}
    assert not [name for name in decayed if "norm" in name]
    plain = {names[id(p)] for p in plain["params"]}
    assert plain | decayed == set(names.values()) - {"pos_embed", "decoder_pos_embed"}


PUBLISHED = {
    "forward": ["imgs", "mask_ratio"],
    "forward_encoder": ["x", "mask_ratio"],
    "forward_decoder": ["x", "ids_restore"],
    "forward_loss": ["imgs", "pred", "mask"],
    "random_masking": ["x", "mask_ratio"],
    "patchify": ["imgs"],
    "unpatchify": ["x"],
    "initialize_weights": [],
    "_init_weights": ["m"],
}
CONSTRUCTOR = [
    "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth",
    "decoder_num_heads", "mlp_ratio", "norm_layer", "norm_pix_loss",
]  # fmt: skip


def test_constructor_arguments():
    """The arguments and their order are as published. All additional arguments are optional."""
    model = mae()
    for name, expected in PUBLISHED.items():
        parameters = list(inspect.signature(getattr(model, name)).parameters.values())
        assert [p.name for p in parameters[: len(expected)]] == expected, name
        assert all(p.default is not p.empty for p in parameters[len(expected) :]), name
    assert inspect.signature(model.forward).parameters["mask_ratio"].default == 0.75
    arguments = inspect.signature(models_mae.MaskedAutoencoderViT).parameters
    assert list(arguments)[: len(CONSTRUCTOR)] == CONSTRUCTOR
    assert all(p.default is not p.empty for p in arguments.values())
    assert next(iter(inspect.signature(models_vit.VisionTransformer).parameters)) == "global_pool"


def test_overridden_methods_are_called():
    """Subclasses may override methods of the published class, with the published arguments."""

    class Derived(models_mae.MaskedAutoencoderViT):
        def forward_encoder(self, x, mask_ratio):
            latent, mask, ids_restore = super().forward_encoder(x, mask_ratio)
            return 2 * latent, mask, ids_restore

        def forward_decoder(self, x, ids_restore):
            return super().forward_decoder(x / 2, ids_restore) + 1

        def forward_loss(self, imgs, pred, mask):
            return ((pred - 1 - self.patchify(imgs)).abs().mean(-1) * mask).sum() / mask.sum()

    plain, derived = mae(), Derived(norm_layer=partial(nn.LayerNorm, eps=1e-6), **SMALL)
    derived.load_state_dict(plain.state_dict())
    images = next(iter(batches(24, torch.float32)))[0]
    torch.manual_seed(1)
    _, pred, mask = plain(images, mask_ratio=0.5)
    torch.manual_seed(1)
    found = derived(images, mask_ratio=0.5)
    loss = ((pred - plain.patchify(images)).abs().mean(-1) * mask).sum() / mask.sum()
    assert_close(dict(enumerate(found)), {0: loss, 1: pred + 1, 2: mask}, 1e-6)


def test_methods_match_eager():
    """Arguments, results and the order of random numbers are the same for each method."""
    model = mae().double()
    eager = ReferenceMAE.of(model)
    images = next(iter(batches(24, torch.float64)))[0]
    found = []
    for one in (model, eager):
        torch.manual_seed(1)
        mask_ratio = [0.5] if one is model else [0.5, None]  # the reference has no default for the noise
        latent, mask, ids_restore = one.forward_encoder(images, *mask_ratio)
        pred = one.forward_decoder(latent, ids_restore)
        loss = one.forward_loss(images, pred, mask)
        kept, again, restored = one.random_masking(pred, *mask_ratio)
        found.append({"latent": latent, "mask": mask, "ids_restore": ids_restore, "pred": pred, "loss": loss})
        found[-1] |= {"kept": kept, "again": again, "restored": restored, "rows": one.patchify(images)}
    assert_close(*found)
    assert torch.equal(model.unpatchify(model.patchify(images)), images)
    before = model.decoder_pred.weight.clone()
    model.initialize_weights()
    assert not torch.equal(model.decoder_pred.weight, before)
    model.apply(model._init_weights)


def test_visualisation(tmp_path):
    """As in the published notebook: the mask of one image as pixels, and the visible patches pasted in."""
    arch = "mae_vit_large_patch16"
    torch.save({"model": mae(seed=3, name=arch).state_dict()}, tmp_path / "mae.pth")
    model = getattr(models_mae, arch)(**SMALL)
    checkpoint = torch.load(tmp_path / "mae.pth", map_location="cpu")
    assert str(model.load_state_dict(checkpoint["model"], strict=False)) == "<All keys matched successfully>"
    picture = torch.rand(24, 24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.einsum("nhwc->nchw", picture[None])

    def in_place(rows):
        return rows.unflatten(2, (4, 4, 3)).unflatten(1, (6, 6)).permute(0, 5, 1, 3, 2, 4).reshape(1, 3, 24, 24)

    def reconstruct(one, unpatchify):
        torch.manual_seed(2)
        loss, y, mask = one(x.float(), mask_ratio=0.75)
        y = torch.einsum("nchw->nhwc", unpatchify(y)).detach().cpu()
        mask = mask.detach().unsqueeze(-1).repeat(1, 1, model.patch_embed.patch_size[0] ** 2 * 3)
        mask = torch.einsum("nchw->nhwc", unpatchify(mask)).detach().cpu()
        return {"loss": loss.detach(), "y": y, "mask": mask, "pasted": picture * (1 - mask) + y * mask}

    ours = reconstruct(model, model.unpatchify)
    assert_close(ours, reconstruct(ReferenceMAE.of(model), in_place), 1e-6)
    assert ours["mask"].mean() == 0.75


def pretrained(**options):
    """A checkpoint of pre-training."""
    return {"model": mae(**options).state_dict()}


def interpolate_position_table(model, checkpoint_model):
    """Resize a square position table in the checkpoint to the grid of the model."""
    table = checkpoint_model["pos_embed"]
    extra = model.pos_embed.shape[-2] - model.patch_embed.num_patches
    old, new = (int((length - extra) ** 0.5) for length in (table.shape[-2], model.pos_embed.shape[-2]))
    if old == new:
        return
    patches = table[:, extra:].reshape(1, old, old, table.shape[-1]).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, size=(new, new), mode="bicubic", align_corners=False)
    checkpoint_model["pos_embed"] = torch.cat([table[:, :extra], patches.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def classifier(checkpoint, global_pool, std=2e-5, size=24, name="vit_base_patch16", **options):
    """A classifier with pre-trained weights, built as in the published scripts."""
    torch.manual_seed(4)
    encoder = {**ENCODER, "img_size": size}
    model = models_vit.__dict__[name](num_classes=10, global_pool=global_pool, **encoder, **options)
    checkpoint_model, state_dict = dict(checkpoint["model"]), model.state_dict()
    for k in ("head.weight", "head.bias"):
        if k in checkpoint_model and checkpoint_model[k].shape != state_dict[k].shape:
            del checkpoint_model[k]
    interpolate_position_table(model, checkpoint_model)
    msg = model.load_state_dict(checkpoint_model, strict=False)
    new = {"head.weight", "head.bias"} | ({"fc_norm.weight", "fc_norm.bias"} if global_pool else set())
    assert set(msg.missing_keys) == new
    dropped = {"mask_token"} | ({"norm.weight", "norm.bias"} if global_pool else set())
    assert {key for key in msg.unexpected_keys if not key.startswith("decoder_")} == dropped
    nn.init.trunc_normal_(model.head.weight, std=std)
    return model


def timm_twin(model):
    """The timm model from which the published model is derived, with the weights of ``model``."""
    from timm.models.vision_transformer import VisionTransformer

    twin = VisionTransformer(
        img_size=model.patch_embed.img_size[0],
        patch_size=4,
        num_classes=10,
        global_pool="avg" if model.global_pool else "token",
        embed_dim=32,
        depth=2,
        num_heads=4,
        drop_path_rate=model.blocks[-1].drop_path.drop_prob,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).to(model.cls_token)
    if isinstance(model.head, nn.Sequential):
        twin.head = nn.Sequential(nn.BatchNorm1d(32, affine=False, eps=1e-6), twin.head).to(model.cls_token)
    twin.load_state_dict(model.state_dict())
    return twin


def layer_decay_groups(model, weight_decay, no_weight_decay_list, layer_decay):
    """One parameter group per layer and weight decay. The learning rate decreases towards the input."""
    last = len(model.blocks) + 1
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decay = 0.0 if p.ndim == 1 or name in no_weight_decay_list else weight_decay
        layer = last
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
            layer = 0
        elif name.startswith("blocks"):
            layer = int(name.split(".")[1]) + 1
        made = {"lr_scale": layer_decay ** (last - layer), "weight_decay": decay, "params": []}
        groups.setdefault((layer, decay), made)["params"].append(p)
    return list(groups.values())


def finetune(model, size=24, epochs=2, autocast=False):
    """Fine-tune as the published script does. Returns losses, gradient norms and the last logits."""
    loader = batches(size, model.cls_token.dtype)
    names = model.no_weight_decay()
    groups = layer_decay_groups(model, 0.05, no_weight_decay_list=names, layer_decay=0.65)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    scaler, criterion = torch.amp.GradScaler("cpu"), SoftTargetCrossEntropy()
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
    np.random.seed(0)  # noqa: NPY002  # timm uses this generator
    losses, norms = [], []
    for epoch in range(epochs):
        model.train(True)
        optimizer.zero_grad()
        torch.manual_seed(epoch)
        for samples, labels in loader:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * group["lr_scale"]
            samples, targets = mixup(samples, labels)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outputs = model(samples)
                loss = criterion(outputs, targets)
            losses.append(loss.item())
            loss /= 1
            norms.append(step(scaler, loss, optimizer, model.parameters(), True))
    return {**results(losses, norms), **evaluation(model, loader, autocast)}


@torch.no_grad()
def evaluation(model, loader, autocast=False):
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return {"logits": torch.cat([model(samples) for samples, _ in loader])}


@pytest.mark.parametrize("global_pool", [True, False], ids=["mean", "cls"])
@pytest.mark.parametrize("size", [24, 32])
def test_finetuning_matches_timm(size, global_pool):
    model = classifier(pretrained(), global_pool, size=size, drop_path_rate=0.3)
    twin = timm_twin(model)
    layers = {group["lr_scale"] for group in layer_decay_groups(model, 0.05, model.no_weight_decay(), 0.5)}
    assert layers == {0.125, 0.25, 0.5, 1.0}
    ours = finetune(model, size)
    assert ours["losses"][6:].mean() < ours["losses"][:6].mean()
    assert_close(ours, finetune(twin, size), 1e-6)


def test_finetuning_under_autocast():
    model = classifier(pretrained(), True)
    twin, exact = timm_twin(model), timm_twin(model.double())
    model.float()
    truth = {name: x.double() for name, x in finetune(exact).items()}
    assert_no_worse_than_eager(finetune(model, autocast=True), finetune(twin, autocast=True), truth, torch.bfloat16)


def test_no_weight_decay_of_finetuning():
    model = classifier(pretrained(), True)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = layer_decay_groups(model, 0.05, model.no_weight_decay(), 0.5)
    plain = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {"cls_token", "pos_embed"} <= plain  # the table is trained here
    assert len(names) == sum(len(group["params"]) for group in groups)


def test_finetuned_model_can_be_loaded_and_evaluated(tmp_path):
    model = classifier(pretrained(), True)
    torch.save({"model": model.state_dict(), "args": Namespace(model="vit_base_patch16")}, tmp_path / "finetuned.pth")
    other = models_vit.__dict__["vit_base_patch16"](num_classes=10, drop_path_rate=0.1, global_pool=True, **ENCODER)
    with torch.serialization.safe_globals([Namespace]):
        checkpoint = torch.load(tmp_path / "finetuned.pth", map_location="cpu")
    other.load_state_dict(checkpoint["model"])
    loader = batches(24, torch.float32)
    assert_close(evaluation(other, loader), evaluation(model, loader), 0)


def probed(checkpoint, global_pool=False):
    """A frozen model with a trainable head after a batch norm."""
    model = classifier(checkpoint, global_pool, std=0.01)
    model.head = nn.Sequential(nn.BatchNorm1d(model.head.in_features, affine=False, eps=1e-6), model.head)
    for p in model.parameters():
        p.requires_grad = False
    for p in model.head.parameters():
        p.requires_grad = True
    return model


def probe(model, epochs=2):
    """Train a linear probe as the published script does. Returns losses, gradient norms and the last logits."""
    loader = batches(24, model.cls_token.dtype)
    model_without_ddp = model
    if dist.is_initialized():
        model = DistributedDataParallel(model)
        model_without_ddp = model.module
    optimizer = torch.optim.SGD(model_without_ddp.head.parameters(), lr=0.1, momentum=0.9)
    scaler, losses, norms = torch.amp.GradScaler("cpu"), [], []
    for _ in range(epochs):
        model.train(True)
        for samples, targets in loader:
            loss = nn.functional.cross_entropy(model(samples), targets)
            losses.append(loss.item())
            norms.append(step(scaler, loss, optimizer, model.parameters(), True))
    return {**results(losses, norms), **evaluation(model, loader)}


@pytest.mark.parametrize("global_pool", [True, False], ids=["mean", "cls"])
def test_linear_probe_matches_timm(global_pool):
    model = probed(pretrained(), global_pool).double()  # the batch norm amplifies rounding errors
    twin = timm_twin(model)
    twin.requires_grad_(False).head.requires_grad_(True)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    ours = probe(model)
    assert ours["losses"][6:].mean() < ours["losses"][:6].mean()
    assert_close(ours, probe(twin))
    assert all(torch.equal(model.get_parameter(name), p) for name, p in frozen.items())
    assert {key for key in model.state_dict() if key.startswith("head")} == {
        "head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked", "head.1.weight", "head.1.bias",
    }  # fmt: skip


def in_processes(folder):
    """The code of each process, which writes its results and weights to its own file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, _ = world()
    model = mae()
    eager = ReferenceMAE.of(model)
    found = {"pretrain": pretrain(model, output=folder if rank == 0 else None), "eager": pretrain(eager)}
    found["weights"] = model.state_dict()
    with torch.serialization.safe_globals([Namespace]):
        dist.barrier()
        checkpoint = torch.load(folder / "checkpoint-1.pth", map_location="cpu")
    model = probed(checkpoint).double()
    twin = timm_twin(model)
    twin.requires_grad_(False).head.requires_grad_(True)
    found |= {"probe": probe(model), "twin": probe(twin)}
    torch.save(found, folder / f"rank-{rank}.pth")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    line += ["--rdzv-endpoint=localhost:0", __file__, str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ran.returncode == 0, ran.stdout
    first, second = (torch.load(tmp_path / f"rank-{rank}.pth") for rank in (0, 1))
    for found in (first, second):
        assert_close(found["pretrain"], found["eager"], 1e-6)
        assert_close(found["probe"], found["twin"])
    assert not torch.equal(first["pretrain"]["losses"], second["pretrain"]["losses"])  # different images
    assert torch.equal(first["pretrain"]["norms"], second["pretrain"]["norms"])  # gradients are averaged
    assert_close(second["weights"], first["weights"], 0)
    saved = torch.load(tmp_path / "checkpoint-1.pth", weights_only=False)["model"]
    assert_close(saved, first["weights"], 0)


if __name__ == "__main__":
    in_processes(Path(sys.argv[1]))
