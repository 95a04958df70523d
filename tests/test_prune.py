"""Pruning: what goes, what stays, and the pruned checkpoint on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from harness import contents, export_command
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from checkpoints import stable_diffusion, text_model
from export.channel_groups import ChannelGroup, channel_groups, choose, importances, units
from export.checkpoint import Checkpoint, open_checkpoint
from export.convert import parity_error, to_onnx
from export.macs import count_macs, native_rows
from export.part import Part
from export.prune import network, parse_ratios, prune, prune_checkpoint
from export.repository import SOURCE, load_parts
from export.source import Source
from networks import pruned as shapes
from networks.loading import CheckpointError
from networks.pruned import attention_widths, head_attribute, pruning_of

RATIOS = {"clip_text": 0.25, "bert": 0.25, "unet": 0.3, "vqgan_decoder": 0.25}


@pytest.fixture(scope="module")
def pruned(tiny, tmp_path_factory) -> Checkpoint:
    """The tiny checkpoint with every model pruned, from disk."""
    folder = tmp_path_factory.mktemp("pruned") / "pruned"
    return prune_checkpoint(open_checkpoint(tiny), RATIOS, folder)


@pytest.fixture
def copy(pruned, tmp_path) -> Path:
    """A copy of the pruned checkpoint to break."""
    return Path(shutil.copytree(pruned.folders["unet"].parent, tmp_path / "copy"))


@torch.no_grad()
def outputs(part: Part) -> torch.Tensor:
    return part.module(**part.example(3, 2))


@pytest.mark.parametrize("model", RATIOS)
def test_the_rebuilt_model_says_exactly_what_the_pruned_one_does(tiny, pruned, model):
    in_memory, ratio = load_parts(open_checkpoint(tiny))[model], RATIOS[model]
    assert prune(in_memory, ratio) == pruning_of(pruned.folders[SOURCE[model]])
    from_disk = load_parts(pruned)[model]
    assert torch.equal(outputs(from_disk), outputs(in_memory))
    assert not torch.equal(outputs(from_disk), outputs(load_parts(open_checkpoint(tiny))[model]))


@pytest.mark.parametrize("model", RATIOS)
def test_macs_fall_by_what_was_asked_and_widths_outside_stay(tiny, pruned, model):
    before, after = load_parts(open_checkpoint(tiny))[model], load_parts(pruned)[model]
    macs, ratio = count_macs(before), RATIOS[model]
    assert (1 - ratio - 0.06) * macs < count_macs(after) <= (1 - ratio) * macs
    assert after.inputs == before.inputs
    assert after.output == before.output
    assert outputs(after).shape == outputs(before).shape
    record = pruning_of(pruned.folders[SOURCE[model]])
    assert record.macs == (macs, count_macs(after))
    assert record.parameters == tuple(
        sum(p.numel() for p in part.module.parameters()) for part in (before, after)
    )


@pytest.mark.parametrize("model", RATIOS)
def test_a_pruned_model_passes_parity(pruned, tmp_path, model):
    part = load_parts(pruned)[model]
    to_onnx(part, tmp_path / "model.onnx")
    assert parity_error(part, tmp_path / "model.onnx") <= part.tolerance


@pytest.mark.parametrize("model", ["unet", "vqgan_decoder"])
def test_group_norms_keep_their_groups(tiny, pruned, model):
    before, after = load_parts(open_checkpoint(tiny))[model], load_parts(pruned)[model]
    narrower = 0
    for name, norm in before.module.named_modules():
        if isinstance(norm, nn.GroupNorm):
            other = after.module.get_submodule(name)
            assert other.num_groups == norm.num_groups
            assert other.num_channels % norm.num_groups == 0
            narrower += other.num_channels < norm.num_channels
    assert narrower


@pytest.mark.parametrize("model", ["clip_text", "bert"])
def test_a_pruned_encoder_is_the_original_without_what_went(tiny, pruned, model):
    before, after = (load_parts(c)[model] for c in (open_checkpoint(tiny), pruned))
    for name, layer in after.module.named_modules():
        if isinstance(layer, nn.Linear):
            weight = before.module.get_submodule(name).weight
            if layer.weight.shape[1] < weight.shape[1]:
                kept = (weight.T[:, None] == layer.weight.T[None]).all(-1).any(1)
                weight.data[:, ~kept] = 0
    torch.testing.assert_close(outputs(after), outputs(before), rtol=1e-4, atol=1e-5)


def test_heads_keep_their_width(tiny, pruned):
    fewer = 0
    for model in RATIOS:
        before, after = (load_parts(c)[model].module for c in (open_checkpoint(tiny), pruned))
        for (old, _, width), (new, _, left) in zip(
            attention_widths(before), attention_widths(after), strict=True
        ):
            heads, heads_left = (getattr(layer, head_attribute(layer)) for layer in (old, new))
            assert left // heads_left == width // heads
            fewer += heads_left < heads
    assert fewer


def test_only_heads_widths_and_inner_channels_go(tiny, pruned):
    before, after = (network(load_parts(c)["unet"]) for c in (open_checkpoint(tiny), pruned))
    changed = {
        name
        for name, parameter in before.named_parameters()
        if parameter.shape != after.get_parameter(name).shape
    }
    inner = ("conv1.", "conv2.", "norm2.", "time_emb_proj", ".to_", ".ff.", "time_embedding")
    last = ("conv_norm_out", "conv_out", "resnets.1.conv_shortcut")
    assert changed
    assert all(any(word in name for word in (*inner, *last)) for name in changed)


def test_the_encoder_of_pictures_stays_in_the_checkpoint(tiny, pruned):
    file = "diffusion_pytorch_model.safetensors"
    before, after = load_file(tiny / "vae" / file), load_file(pruned.folders["vae"] / file)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.startswith(("encoder.", "quant_conv.")):
            assert torch.equal(tensor, after[name]), name


class Summed(nn.Module):
    """Feed-forward channels whose worth is known: channel k adds k to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(4, 32), nn.Linear(32, 4, bias=False)
        nn.init.constant_(self.rise.weight, 0.5)
        nn.init.zeros_(self.rise.bias)
        self.fall.weight.data[:] = torch.arange(32.0).roll(7)

    def forward(self, x):
        return self.fall(self.rise(x))


def test_what_matters_least_goes_first():
    module, rows = Summed(), {"x": torch.ones(64, 4)}
    (group,) = channel_groups(module, rows)
    (importance,) = importances(module, [group], rows)
    assert importance.argsort().tolist() == torch.arange(32).roll(7).argsort().tolist()
    group.units = units(group, importance)
    positions = {module.rise: 1, module.fall: 1}
    gone, removed = choose([group], positions, wanted=65)
    assert sorted(gone[group]) == [*range(7, 23)]  # two units of eight, 64 MACs each
    assert removed == 128


def test_a_layer_never_loses_its_last_unit():
    module, rows = Summed(), {"x": torch.ones(8, 4)}
    (group,) = channel_groups(module, rows)
    group.units = units(group, torch.arange(32.0))
    gone, removed = choose([group], {module.rise: 1, module.fall: 1}, wanted=10**9)
    assert len(gone[group]) == 24
    assert removed == 24 * 8


def test_channels_of_a_norm_go_from_every_group_alike():
    group = ChannelGroup(None, nn.Conv2d(12, 4, 3), {}, None, norm_groups=4)
    importance = torch.tensor([3.0, 1, 2, 9, 8, 7, 4, 5, 6, 1, 2, 3])
    assert [unit for _, unit in units(group, importance)] == [
        [1, 5, 6, 9], [2, 4, 7, 10], [0, 3, 8, 11],
    ]  # fmt: skip


def test_pruning_by_importance_loses_less_than_pruning_the_rest(tiny, monkeypatch):
    """The order matters: the same pruning of what matters most changes the output more."""
    errors = []
    for measure in (importances, lambda *given: [1 / (i + 1e-9) for i in importances(*given)]):
        monkeypatch.setattr("export.prune.importances", measure)
        part = load_parts(open_checkpoint(tiny))["unet"]
        wanted = outputs(part)
        prune(part, 0.3)
        errors.append(float((outputs(part) - wanted).square().mean()))
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "t5"])
def test_text_models_beside_clip_are_pruned_and_saved_with_their_head(tmp_path, kind):
    source = stable_diffusion(tmp_path / "sd", distilled=True)
    opened = open_checkpoint(source, text_model(tmp_path / kind, kind))
    pruned = prune_checkpoint(opened, {"bert": 0.2}, tmp_path / "pruned")
    again = load_parts(open_checkpoint(tmp_path / "pruned"))  # --bert is not needed any more
    macs = count_macs(load_parts(opened)["bert"])
    assert count_macs(again["bert"]) <= 0.8 * macs
    assert torch.equal(outputs(again["bert"]), outputs(load_parts(pruned)["bert"]))
    rows = native_rows(again["fusion"], 2)
    assert torch.equal(again["fusion"].module(**rows), rows["clip_tokens"])


def test_pruning_keeps_the_layers_of_clip_that_are_skipped(tmp_path):
    source = stable_diffusion(tmp_path / "sd", distilled=True)
    config = CLIPTextConfig.from_pretrained(source / "text_encoder", num_hidden_layers=3)
    CLIPTextModel(config).save_pretrained(source / "text_encoder")
    opened = open_checkpoint(Source(str(source), clip_skip=1))
    assert prune_checkpoint(opened, {"clip_text": 0.2}, tmp_path / "pruned").clip_skip == 1


def test_a_text_model_that_cannot_be_pruned_is_named(tmp_path):
    source = stable_diffusion(tmp_path / "sd", distilled=True)
    opened = open_checkpoint(source, text_model(tmp_path / "gpt2", "gpt2"))
    with pytest.raises(CheckpointError, match="--prune bert: no layer of a GPT2Model can be"):
        prune_checkpoint(opened, {"bert": 0.2}, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unet=0", "--prune unet=0 is not allowed: a share of its MACs to remove, over 0 and"),
        ("unet=1", "--prune unet=1 is not allowed"),
        ("unet=-0.3", "--prune unet=-0.3 is not allowed"),
        ("unet=nan", "--prune unet=nan is not allowed"),
        ("unet=much", "--prune unet=much is not allowed"),
        ("unet", "--prune unet= is not allowed"),
        ("bert=0.1,bert=0.2", "--prune bert is named twice"),
        ("unet=0.3,text_encoder=0.2", "--prune 'text_encoder' cannot be pruned: clip_text, bert"),
        ("fusion=0.2", "--prune 'fusion' cannot be pruned"),
    ],
)
def test_ratios_that_are_not_allowed_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_ratios(text)


def test_ratios_are_read():
    assert parse_ratios("unet=0.3, bert = .25") == {"unet": 0.3, "bert": 0.25}


def test_a_ratio_that_cannot_be_reached_says_what_can(tiny, tmp_path):
    opened = open_checkpoint(tiny)
    with pytest.raises(CheckpointError, match=r"unet=0.99 is not allowed: at most 0\.\d+ can go"):
        prune_checkpoint(opened, {"unet": 0.99}, tmp_path / "pruned")
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_is_there_is_not_overwritten(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="is there already"):
        prune_checkpoint(open_checkpoint(tiny), {"unet": 0.3}, tmp_path)


def test_what_is_pruned_is_not_pruned_again(pruned, tmp_path):
    with pytest.raises(CheckpointError, match="--prune unet: pruned has it pruned already"):
        prune_checkpoint(
            open_checkpoint(pruned.folders["unet"].parent), {"unet": 0.3}, tmp_path / "twice"
        )


def edit(folder: Path, change) -> None:
    file = folder / "unet" / "shapes.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def another_width(record):
    name = next(name for name, shape in record["shapes"].items() if "ff.net.2.weight" in name)
    record["shapes"][name][1] -= 8


def a_tensor_less(record):
    del record["shapes"]["conv_in.bias"]


def a_tensor_more(record):
    record["shapes"]["conv_in.scale"] = [32]


def another_rank(record):
    record["shapes"]["conv_in.weight"] = [32, 36]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_width, r"does not match shapes.json: size mismatch for .*ff\.net\.2\.weight"),
        (a_tensor_less, r"shapes.json lacks conv_in.bias"),
        (a_tensor_more, r"shapes.json has conv_in.scale"),
        (another_rank, r"shapes.json gives conv_in.weight \[32, 36\]: it has \[32, 4, 3, 3\]"),
        (lambda record: record.pop("shapes"), r"shapes.json is not a manifest of shapes"),
    ],
)
def test_shapes_that_do_not_match_the_weights_are_named(copy, change, message):
    edit(copy, change)
    with pytest.raises(CheckpointError, match=message):
        load_parts(open_checkpoint(copy))


def test_weights_of_another_pruning_are_named(copy):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"] = torch.zeros(16)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"size mismatch for conv_in\.bias"):
        load_parts(open_checkpoint(copy))


@pytest.mark.parametrize("failing", ["weights", "copies"])
def test_a_disk_that_fills_while_pruning_is_one_sentence(tiny, tmp_path, monkeypatch, failing):
    text = "No space left on device"

    def weights(*_):
        raise SafetensorError(text)

    def copies(source, target, **_):
        raise shutil.Error([(str(source), str(target), text)])

    if failing == "weights":
        monkeypatch.setattr(shapes, "save_model", weights)
    else:
        monkeypatch.setattr(shutil, "copytree", copies)
    folder = tmp_path / "pruned"
    with pytest.raises(CheckpointError, match=f"^cannot write {folder}: {text}$"):
        prune_checkpoint(open_checkpoint(tiny), {"clip_text": 0.25}, folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prune", "unet=2"], "--prune unet=2 is not allowed"),
        (["--prune", "unet=0.3", "--only", "bert"], "--prune unet: --only leaves it out"),
        (["--gate"], "--gate has nothing to compare: no model is optimised"),
        (["--gate-against", "x"], "--gate-against, -psnr and -prompts say what --gate does"),
        (
            ["--prune", "unet=0.3", "--gate-psnr", "2"],
            "say what --gate does: --gate is not",
        ),
        (["--save-pruned", "x"], "--save-pruned x: nothing is pruned without --prune"),
        (["--prune", "unet=0.3", "--save-pruned", "no/x"], "--save-pruned no/x: no is no folder"),
    ],
)
def test_the_command_names_flags_that_are_not_allowed(tiny, repository, flags, message):
    before = contents(repository)
    done = export_command(tiny, "--repository", repository, *flags)
    assert done.exit_code == 1
    assert message in done.stdout
    assert contents(repository) == before
