"""Sets that are made: CURVES by its recipe, FACES out of Olivetti's faces."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from kronscope.studies import data
from kronscope.studies.data import curve, face

needs_faces = pytest.mark.skipif(
    not Path(os.environ.get("KRONSCOPE_DATA", "/nowhere"), "olivetti").is_dir(),
    reason="needs the real file in $KRONSCOPE_DATA/olivetti",
)


def test_a_straight_curve_is_a_stroke_of_its_width():
    """From (5, 14) to (23, 14): along row borders, so both rows beside it are full."""
    points = torch.tensor([[[5.0, 14.0], [14.0, 14.0], [23.0, 14.0]]])
    picture = curve.draw(points).view(28, 28)
    assert picture[13, 5:23].tolist() == pytest.approx([1.0] * 18)
    torch.testing.assert_close(picture, picture.flip(0))
    assert torch.equal(picture[[11, 16]], torch.zeros(2, 28))
    assert picture.sum().item() == pytest.approx(2 * 18 + torch.pi, abs=0.3)  # and round ends


def test_pixels_fall_off_with_the_distance_to_the_curve():
    """Against the distance to 4,001 points of the curve itself."""
    points = 3 + 22 * torch.rand(20, 3, 2)
    t = torch.linspace(0, 1, 4001)[:, None]
    a, b, c = points.unbind(1)
    on = (1 - t) ** 2 * a[:, None] + 2 * t * (1 - t) * b[:, None] + t**2 * c[:, None]
    middles = torch.cartesian_prod(torch.arange(28.0), torch.arange(28.0)).flip(1) + 0.5
    distance = torch.cdist(middles.to(on).expand(20, -1, -1), on).amin(2)
    expected = (1.5 - distance).clamp(0, 1)
    torch.testing.assert_close(curve.draw(points), expected, atol=0.03, rtol=0)


def test_a_curve_of_one_point_is_a_dot():
    dot = curve.draw(torch.full((1, 3, 2), 10.0))
    assert torch.isfinite(dot).all()
    assert dot.sum().item() == pytest.approx(torch.pi, abs=0.3)


def test_curves_are_made_once_and_always_the_same(folder, monkeypatch):
    monkeypatch.setattr(curve, "TRAIN", 150)
    monkeypatch.setattr(curve, "TEST", 70)
    found = data.curves()
    assert found.train_inputs.shape == (150, 784)
    assert found.test_inputs.shape == (70, 784)
    assert found.train_inputs.dtype == torch.float32
    assert found.train_targets is found.train_inputs
    assert 0 == found.train_inputs.min() < found.train_inputs.max() == 1
    assert len(found.train_inputs.unique(dim=0)) == 150
    edges = found.train_inputs.view(-1, 28, 28)[:, [0, -1]]
    assert not edges.any()  # no curve is cut off
    (entry,) = (folder / "cache").glob("*.npz")
    assert entry.name == f"curves-{curve.VERSION}-seed0.npz"
    again = data.curves()
    assert torch.equal(again.train_inputs, found.train_inputs)
    entry.write_bytes(entry.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="made again"):
        assert torch.equal(data.curves().test_inputs, found.test_inputs)
    assert not torch.equal(data.curves(seed=1).test_inputs, found.test_inputs)


def test_brightness_of_the_curves():
    made = curve.pictures(3000, seed=0)["pictures"]
    assert made.shape == (3000, 784)
    assert made.dtype == np.uint8
    assert made.mean() / 255 == pytest.approx(0.0439, abs=0.0005)  # of this recipe


def people(value=lambda k: 6 * k):
    """Pictures of which each shows one brightness, that of its person."""
    return np.repeat(value(np.arange(40)), 10)[:, None, None].repeat(64, 1).repeat(64, 2)


def write(folder, pictures):
    """In the published file's form; returns what it holds."""
    (folder / "olivetti").mkdir(exist_ok=True)
    columns = pictures.transpose(0, 2, 1).reshape(400, 4096).T.astype(np.uint8)
    savemat(folder / "olivetti" / "olivettifaces.mat", {"faces": columns})
    return columns.tobytes()


def test_olivetti_is_upright_with_its_people(folder, publish):
    pictures = np.random.default_rng(0).integers(256, size=(400, 64, 64))
    publish("Olivetti's faces", "olivettifaces.mat", write(folder, pictures))
    found = data.olivetti()
    assert found.train_inputs.shape == (320, 1, 64, 64)
    assert found.train_targets.tolist() == [k for k in range(40) for _ in range(8)]
    assert found.test_targets.tolist() == [k for k in range(40) for _ in range(2)]
    expected = torch.from_numpy(pictures[18] / 255).float()
    torch.testing.assert_close(found.test_inputs[2, 0], expected)


def test_olivetti_of_another_shape(folder):
    (folder / "olivetti").mkdir()
    path = folder / "olivetti" / "olivettifaces.mat"
    savemat(path, {"faces": np.zeros((4096, 10), np.uint8)})
    with pytest.raises(ValueError, match=r"faces: uint8 \(4096, 10\); expected a MATLAB") as error:
        data.faces()
    assert str(path) in str(error.value)


def test_olivetti_with_other_pictures(folder):
    write(folder, people())
    with pytest.raises(ValueError, match=r"olivettifaces\.mat has .* not its content") as error:
        data.olivetti()
    assert "register a problem of your own" in str(error.value)


def test_the_file_that_scikit_learn_fetches_is_taken_too(folder, publish):
    write(folder, people())
    content = (folder / "olivetti" / "olivettifaces.mat").read_bytes()
    publish("scikit-learn's copy of Olivetti's faces", "olivettifaces.mat", content)
    assert data.olivetti().test_inputs.shape == (80, 1, 64, 64)


def test_olivetti_is_fetched_where_there_is_no_file(folder, monkeypatch, publish, serve, site):
    write(folder, people())
    content = (folder / "olivetti" / "olivettifaces.mat").read_bytes()
    publish("scikit-learn's copy of Olivetti's faces", "olivettifaces.mat", content)
    before = data.olivetti()
    serve("Olivetti's faces", {"olivettifaces.mat": content})
    monkeypatch.delenv("KRONSCOPE_DATA")
    for _ in range(2):
        assert torch.equal(data.olivetti().train_inputs, before.train_inputs)
    assert len(site.asked) == 1


def test_people_to_train_and_to_test_are_apart(monkeypatch):
    monkeypatch.setattr(face, "OF_A_PICTURE", 3)
    found = face.patches(people(), seed=0)
    assert {k: v.shape for k, v in found.items()} == {"train": (750, 625), "test": (300, 625)}
    shown = {name: set((found[name] // 6).ravel()) for name in found}
    assert shown == {"train": set(range(25)), "test": set(range(30, 40))}
    assert not np.array_equal(found["train"], np.sort(found["train"], axis=0))  # shuffled


def test_patches_are_turned_shrunk_and_inside_the_picture():
    """Of a picture that is linear in x and y a patch is linear too: its slopes tell the map."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    generator = torch.Generator().manual_seed(3)
    px, py = face.cut(torch.stack([x, y]), 300, generator).view(2, 300, 25, 25)
    assert px.dtype == torch.float32
    assert min(px.min(), py.min()) >= 0
    assert max(px.max(), py.max()) <= 63
    generator = torch.Generator().manual_seed(3)
    same = face.cut(torch.stack([x, y]), 300, generator).view(2, 300, 25, 25)
    assert torch.equal(same[0], px)
    for patch, own in ((px, 0), (py, 1)):
        right, down = patch.diff(dim=2), patch.diff(dim=1)
        assert right.std(dim=(1, 2)).max() < 1e-3
        scale = (right.mean((1, 2)) ** 2 + down.mean((1, 2)) ** 2).sqrt()
        assert 1.4 - 1e-3 < scale.min() < 1.42
        assert 1.78 < scale.max() < 1.8 + 1e-3
        upright = (right if own == 0 else down).mean((1, 2))  # scale times cos
        assert upright.min() > -1e-3  # turned by no more than a quarter
        turned = (right if own == 1 else down).mean((1, 2)) / scale
        assert turned.min() < -0.95
        assert turned.max() > 0.95


@needs_faces
def test_real_faces(cache, monkeypatch):
    assert 250 * face.OF_A_PICTURE == 103_500
    assert 100 * face.OF_A_PICTURE == 41_400
    monkeypatch.setattr(face, "OF_A_PICTURE", 41)
    found = data.faces()
    assert found.train_inputs.shape == (10_250, 625)
    assert found.test_inputs.shape == (4_100, 625)
    assert found.train_inputs.mean(0).abs().max() < 1e-4
    assert found.train_inputs.var(0).mean().item() == pytest.approx(1, abs=1e-3)
    assert 0.5 < found.test_inputs.var(0).mean() < 2
    assert torch.equal(data.faces().test_inputs, found.test_inputs)
    assert len(list(cache.glob("faces-*.npz"))) == 1


@needs_faces
def test_real_olivetti():
    found = data.olivetti()
    # the first pixels as scikit-learn's documentation prints them
    first = found.train_inputs[0, 0, 0, :3].tolist()
    assert first == pytest.approx([0.30991736, 0.3677686, 0.41735536], abs=1e-6)
