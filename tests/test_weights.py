"""Starting from other weights: the report, moved position tables, refusals."""

import copy

import pytest
import timm
import torch
from small_trunks import FAMILIES
from timm.layers import resample_abs_pos_embed
from timm.models.nest import resize_pos_embed
from torch import nn

from halfseen import weights
from halfseen.checkpoint import read_weights
from halfseen.config import ConfigError, Model
from halfseen.models import ViT
from halfseen.models.hierarchical import TimmConfig, TimmTrunk
from halfseen.models.positions import resize
from halfseen.models.pyramid import Pyramid, PyramidConfig
from halfseen.models.relative import resize_relative
from halfseen.models.swin import Swin, SwinConfig


class Student(nn.Module):
    """A trunk with a head, as the fine-tuning stage's."""

    def __init__(self, side=32, classes=5, **model) -> None:
        super().__init__()
        self.encoder = ViT(Model(width=16, depth=2, heads=2, patch=8, **model), side)
        self.head = nn.Linear(16, classes)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def image(side=32):
    return torch.randn(2, 3, side, side)


def test_weights_of_the_same_student_are_all_loaded_and_it_computes_the_same():
    source, student = Student(), Student()
    report = weights.initialise(student, source.state_dict(), coverage=1.0)
    assert report.covered == 1.0
    assert report.loaded == list(student.state_dict())
    assert not report.resized
    assert not report.new
    assert not report.unused
    x = image()
    assert torch.equal(student.encoder(x), source.encoder(x))


def test_parts_of_another_objective_are_reported_unused_and_the_own_head_new():
    given = {f"encoder.{name}": value for name, value in Student().encoder.state_dict().items()}
    given["decoder.embed.weight"] = torch.randn(3, 3)
    student = Student()
    head = student.head.weight.detach().clone()
    report = weights.initialise(student, given, coverage=1.0)
    assert report.unused == ["decoder.embed.weight"]
    assert report.new == {"head.weight": "not given", "head.bias": "not given"}
    assert torch.equal(student.head.weight, head)


def test_a_head_of_other_classes_is_not_loaded_and_the_report_says_why():
    report = weights.initialise(Student(classes=3), Student(classes=5).state_dict(), coverage=1.0)
    assert report.new["head.weight"] == "given as (5, 16), needed as (3, 16)"
    assert "head.weight" in str(report)
    assert "given as (5, 16)" in str(report)


def test_too_little_is_refused_with_the_report_and_the_student_is_untouched():
    student = Student()
    before = copy.deepcopy(student.state_dict())
    given = {name: value for name, value in Student().state_dict().items() if "mlp" not in name}
    with pytest.raises(ConfigError, match=r"run.init_coverage=0\.9") as refused:
        weights.initialise(student, given, coverage=0.9)
    assert "encoder.blocks.0.mlp.fc1.weight (not given)" in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_coverage_counts_the_trunks_numbers_not_its_names():
    student, given = Student(), {}
    for name, value in Student().state_dict().items():
        if "mlp" in name or "qkv" in name:
            given[name] = value
    report = weights.initialise(student, given, coverage=0.0)
    trunk = [(n, v.numel()) for n, v in student.state_dict().items() if n.startswith("encoder.")]
    expected = sum(size for name, size in trunk if name in given) / sum(size for _, size in trunk)
    assert report.covered == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    given = Student().state_dict()
    given["encoder.blocks.1.mlp.fc1.bias"][3] = bad
    with pytest.raises(ConfigError, match=r"encoder\.blocks\.1\.mlp\.fc1\.bias.*NaN or infinity"):
        weights.initialise(Student(), given, coverage=0.0)


@pytest.mark.parametrize("side", [48, (40, 24)])
def test_a_position_table_moves_to_another_grid_with_its_class_row(side):
    source, student = Student(), Student(side=side)
    report = weights.initialise(student, source.state_dict(), coverage=1.0)
    height, width = student.encoder.grid
    assert report.resized == {"encoder.pos_embed": f"4x4 -> {height}x{width}"}
    assert torch.equal(student.encoder.pos_embed[:, 0], source.encoder.pos_embed[:, 0])
    plane = source.encoder.pos_embed[:, 1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    moved = nn.functional.interpolate(plane, (height, width), mode="bicubic").flatten(2).transpose(1, 2)
    assert torch.equal(student.encoder.pos_embed[:, 1:], moved)


def test_a_table_that_is_no_square_grid_is_refused_when_it_would_have_to_move():
    given = Student(side=(32, 24)).state_dict()
    weights.initialise(Student(side=(32, 24)), given, coverage=1.0)
    with pytest.raises(ConfigError, match=r"13 rows is no square grid(.|\n)*run\.init_grid="):
        weights.initialise(Student(side=48), given, coverage=0.0)


@pytest.mark.parametrize("there", [True, False])
def test_a_class_row_that_one_side_lacks_is_added_or_folded_without_changing_the_function(there):
    source, student = Student(position_on_class=there), Student(position_on_class=not there)
    report = weights.initialise(student, source.state_dict(), coverage=1.0)
    assert list(report.resized) == ["encoder.pos_embed"]
    x = image()
    torch.testing.assert_close(student.encoder(x), source.encoder(x))


def test_a_class_row_is_made_to_fit_also_when_the_grid_moves():
    source, student = Student(position_on_class=False), Student(side=48)
    report = weights.initialise(student, source.state_dict(), coverage=1.0)
    assert report.resized["encoder.pos_embed"] == "zero class row added, 4x4 -> 6x6"
    assert not student.encoder.pos_embed[:, 0].any()


def test_a_timm_model_is_read_by_its_own_names_and_the_trunk_computes_the_same():
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    source = timm.models.VisionTransformer(**options).eval()
    nn.init.normal_(source.head.weight)
    student = Student().eval()
    report = weights.initialise(student, source.state_dict(), coverage=1.0)
    assert report.layout == "timm"
    assert not report.new
    assert not report.unused
    x = image()
    torch.testing.assert_close(student.head(student.encoder(x)[:, 0]), source(x))


def test_weights_of_something_else_are_refused():
    with pytest.raises(ConfigError, match="no known layout"):
        weights.initialise(Student(), {"layer1.0.conv1.weight": torch.zeros(1)}, coverage=0.0)


def test_a_deeper_trunk_is_refused_by_the_names_that_would_be_lost():
    given = Student().state_dict()
    given |= {name.replace("blocks.1.", "blocks.2."): value for name, value in given.items() if "blocks.1." in name}
    student = Student()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ConfigError, match=r"run\.init=.*encoder\.blocks\.2\.norm1\.weight.* and \d+ more.*\n.*=0"):
        weights.initialise(student, given, coverage=0.9)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    report = weights.initialise(student, given, coverage=0.0)
    assert report.covered == 1.0
    assert len(report.unused) == sum("blocks.1." in name for name in before)


def test_a_stem_without_a_place_is_refused():
    given = Student().state_dict() | {"encoder.patch_embed.proj.9.weight": torch.zeros(2)}
    with pytest.raises(ConfigError, match=r"encoder\.patch_embed\.proj\.9\.weight"):
        weights.initialise(Student(), given, coverage=0.5)


@pytest.mark.parametrize("name", ["junk.pth", "junk.pt", "junk.bin", "junk.safetensors"])
@pytest.mark.parametrize("content", [b"", b"junk, and no weights at all", b"PK\x03\x04 half a zip", b"\x80\x02h\x05."])
def test_junk_is_refused_by_its_path(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        read_weights(tmp_path / name)


def test_a_file_that_holds_no_state_dict_is_refused(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match=r"list\.pth.*holds a list"):
        read_weights(tmp_path / "list.pth")


# --------------------------------------------------------------------------------------------- relative tables


def scrambled(student):
    for name, parameter in student.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(parameter)
    return student


def test_a_relative_table_of_the_same_grid_is_copied_as_it_is():
    source, student = scrambled(Student(relative="shared")), Student(relative="shared")
    report = weights.initialise(student, source.state_dict(), coverage=1.0)
    assert not report.resized
    x = image()
    assert torch.equal(student.encoder(x), source.encoder(x))


@pytest.mark.parametrize("side", [48, (40, 24)])
def test_a_relative_table_moves_to_another_grid_by_the_geometric_rule(side):
    source, student = scrambled(Student(relative="block")), Student(side=side, relative="block")
    report = weights.initialise(student, source.state_dict(), coverage=1.0)
    name = "encoder.blocks.1.attn.relative_position_bias_table"
    height, width = student.encoder.grid
    assert report.resized[name] == f"4x4 -> {height}x{width}"
    moved = resize_relative(source.state_dict()[name], (4, 4), (height, width))
    assert torch.equal(student.state_dict()[name], moved)


def test_a_table_of_all_blocks_is_copied_into_each_without_changing_the_function():
    source, student = scrambled(Student(relative="shared")), Student(relative="block")
    report = weights.initialise(student, source.state_dict(), coverage=1.0)
    assert report.resized["encoder.blocks.0.attn.relative_position_bias_table"].startswith("copied")
    assert not report.unused
    x = image()
    torch.testing.assert_close(student.encoder(x), source.encoder(x))


@pytest.mark.parametrize("there", [True, False])
def test_relative_rows_of_a_class_token_that_one_side_lacks_are_zero_or_left_out(there):
    source = scrambled(Student(relative="shared", class_token=there, position="none"))
    student = Student(relative="shared", class_token=not there, position="none")
    weights.initialise(student, source.state_dict(), coverage=0.9)
    given, table = (s.encoder.rel_pos_bias.relative_position_bias_table for s in (source, student))
    assert torch.equal(table[:49], given[:49])
    assert not there or len(table) == 49
    assert there or not table[49:].any()


def test_a_relative_table_of_no_square_grid_is_refused_when_it_would_have_to_move():
    given = Student(side=(32, 24), relative="shared", position="none").state_dict()
    with pytest.raises(ConfigError, match="38 rows is no square grid"):
        weights.initialise(Student(side=48, relative="shared", position="none"), given, coverage=0.0)


@pytest.mark.parametrize("there", [True, False])
def test_a_distillation_token_that_one_side_lacks_is_left_out_or_starts_without_a_place(there):
    source, student = Student(distillation_token=there), Student(distillation_token=not there)
    report = weights.initialise(student, source.state_dict(), coverage=0.9)
    assert "distillation row" in report.resized["encoder.pos_embed"]
    given, table = source.encoder.pos_embed, student.encoder.pos_embed
    assert torch.equal(table[:, 0], given[:, 0])
    assert torch.equal(table[:, -16:], given[:, -16:])
    assert there or not table[:, 1].any()


@pytest.mark.parametrize("tokens", [{}, {"distillation_token": True}, {"registers": 2}, {"class_token": False}])
@pytest.mark.parametrize("side", [(40, 24), 48, (24, 40)])
def test_tables_of_a_stated_grid_move_to_any_other_with_the_rows_of_their_tokens(tokens, side):
    """Patches 3 down and 5 across; (24, 40) is that grid, and (40, 24) has as many rows in another order."""
    make = {"relative": "block", **tokens}
    source, student = scrambled(Student(side=(24, 40), **make)), Student(side=side, **make)
    report = weights.initialise(student, source.state_dict(), coverage=1.0, grid=(3, 5))
    new, rows = student.encoder.grid, student.encoder.position_rows
    name = "encoder.blocks.1.attn.relative_position_bias_table"
    given, filled = source.state_dict(), student.state_dict()
    assert torch.equal(filled["encoder.pos_embed"][:, :rows], given["encoder.pos_embed"][:, :rows])
    assert torch.equal(filled["encoder.pos_embed"], resize(given["encoder.pos_embed"], (3, 5), new, rows))
    assert torch.equal(filled[name], resize_relative(given[name], (3, 5), new))
    assert not report.new
    assert set(report.resized.values()) == ({f"3x5 -> {new[0]}x{new[1]}"} if new != (3, 5) else set())


def test_a_stated_grid_that_the_tables_do_not_have_is_refused():
    given = Student(side=(24, 40)).state_dict()
    with pytest.raises(ConfigError, match=r"run\.init_grid=\[4, 5\]: a position table of 16 rows is no grid of 4x5"):
        weights.initialise(Student(side=48), given, coverage=0.0, grid=(4, 5))


@pytest.mark.parametrize("name", ["nest", "tnt", "swin", "pvt_v2", "twins_svt"])
def test_trunks_of_timm_start_from_weights_for_other_sizes_of_images(name):
    model, size, options = FAMILIES[name]
    source, student = (nn.Module(), nn.Module())
    source.encoder, student.encoder = (TimmTrunk(TimmConfig(model, 0.0, dict(options)), side) for side in (size, 128))
    if name == "nest":
        nn.init.normal_(source.encoder.body.levels[1].pos_embed)
    given = {key: value.clone() for key, value in source.encoder.body.state_dict().items()}
    report = weights.initialise(student, source.state_dict(), coverage=1.0)
    assert not report.new
    ours = student.encoder.body.state_dict()
    moved = {key.removeprefix("encoder.body.") for key in report.resized}
    if name == "nest":
        expected = {key: resize_pos_embed(given[key], ours[key]) for key in given if key.endswith("pos_embed")}
    elif name == "tnt":
        moved_table = resample_abs_pos_embed(given["patch_pos"], (8, 8), antialias=False)
        expected = {"patch_pos": moved_table}
    else:
        expected = {}
    assert moved == expected.keys()
    for key, value in (given | expected).items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-6 if key in expected else 0)
    assert student.encoder(torch.randn(1, 3, 128, 128)).shape[1] == student.encoder.prefix + student.encoder.tokens


def test_a_nest_of_other_levels_is_refused_and_not_squeezed():
    source, student = nn.Module(), nn.Module()
    source.encoder, student.encoder = (TimmTrunk(TimmConfig("nest_for_tests"), side) for side in (64, 64))
    given = source.state_dict()
    name = "encoder.body.levels.0.pos_embed"
    given[name] = torch.zeros(1, 64, 4, 8)
    with pytest.raises(ConfigError, match="needed as"):
        weights.initialise(student, given, coverage=1.0)


@pytest.mark.parametrize("kind", ["swin", "pyramid", "of timm"])
def test_a_deeper_trunk_of_stages_is_refused_too(kind):
    def made(depths):
        holder = nn.Module()
        shape = {"depths": depths, "heads": [1, 1]}
        if kind == "swin":
            holder.encoder = Swin(SwinConfig(width=8, window=4, **shape), 32)
        elif kind == "pyramid":
            shape |= {"widths": [8, 8], "mlp_ratios": [1, 1], "reductions": [1, 1]}
            holder.encoder = Pyramid(PyramidConfig(**shape), 32)
        else:
            model, _, options = FAMILIES["swin"]
            holder.encoder = TimmTrunk(TimmConfig(model, 0.0, dict(options) | {"depths": depths}), 64)
        return holder

    given = made([1, 3]).state_dict()
    with pytest.raises(ConfigError, match="no place for these weights of the trunk"):
        weights.initialise(made([1, 2]), given, coverage=1.0)
    weights.initialise(made([1, 2]), given, coverage=0.0)


def test_tables_that_follow_from_the_sizes_are_no_part_that_is_lost():
    holder = nn.Module()
    holder.encoder = TimmTrunk(TimmConfig(FAMILIES["swin"][0], 0.0, dict(FAMILIES["swin"][2])), 64)
    older = {"encoder.body.layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}
    report = weights.initialise(holder, holder.state_dict() | older, coverage=1.0)
    assert report.unused == list(older)


def test_the_absolute_table_of_a_swin_is_of_the_patches_of_its_stem():
    source, student = nn.Module(), nn.Module()
    options = {"width": 8, "depths": [1, 1], "heads": [1, 1], "window": 4, "absolute": True}
    source.encoder, student.encoder = (Swin(SwinConfig(**options), side) for side in (32, 64))
    report = weights.initialise(student, source.state_dict(), coverage=1.0)
    name = "encoder.absolute_pos_embed"
    assert report.resized == {name: "8x8 -> 16x16"}
    expected = resize(source.state_dict()[name], (8, 8), (16, 16), 0)
    assert torch.equal(student.state_dict()[name], expected)
