"""Augmentation: what it does to pictures, and that training stays exact with it."""

from dataclasses import replace

import pytest
import torch

from kronscope.studies import data, problems
from kronscope.studies.data import crop_and_flip
from kronscope.studies.training import checkpoints
from kronscope.studies.training import loop as training

SMALL = problems.get("cifar10-subset-cnn-small")
AUGMENTED = replace(SMALL, augment=crop_and_flip)


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_picture_is_a_crop_of_the_padded_one_mirrored_or_not():
    pictures = torch.rand(200, 2, 5, 6) + 1
    found = crop_and_flip(pictures, random(), padding=2, fill=(-1.0, -2.0))
    padded = torch.stack([-torch.ones(200, 9, 10), -2 * torch.ones(200, 9, 10)], dim=1)
    padded[:, :, 2:7, 2:8] = pictures
    seen = set()
    for n in range(200):
        crops = {
            (y, x, flip): crop.flip(2) if flip else crop
            for y in range(5)
            for x in range(5)
            for flip in (False, True)
            for crop in [padded[n, :, y : y + 5, x : x + 6]]
        }
        fits = [key for key, crop in crops.items() if torch.equal(found[n], crop)]
        assert len(fits) == 1, n
        seen |= set(fits)
    assert len(seen) == 50  # every shift with and without the mirror


def test_draws_are_the_generators():
    pictures = torch.rand(20, 3, 8, 8)
    before = torch.get_rng_state()
    generator = random()
    first, second = crop_and_flip(pictures, generator), crop_and_flip(pictures, generator)
    assert not torch.equal(first, second)
    assert torch.equal(crop_and_flip(pictures, random()), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_padding_only_the_mirror_is_left():
    pictures = torch.rand(50, 1, 4, 4)
    found = crop_and_flip(pictures, random(), padding=0)
    same = (found == pictures).flatten(1).all(1)
    assert torch.equal(found[~same], pictures[~same].flip(3))
    assert 10 < same.sum() < 40


def test_black_is_what_zero_becomes():
    edge = data.black(data.CIFAR_MEAN, data.CIFAR_STD)
    assert edge == pytest.approx([-0.4914 / 0.2023, -0.4822 / 0.1994, -0.4465 / 0.2010])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_same_on_a_gpu():
    pictures = torch.rand(20, 3, 8, 8)
    found = crop_and_flip(pictures.cuda(), random())
    assert found.is_cuda
    assert torch.equal(found.cpu(), crop_and_flip(pictures, random()))


def settings(problem=AUGMENTED, optimizer="adam", **changes):
    return training.Settings(problem, optimizer, **{"epochs": 3, **changes})


def final(chosen, **keywords):
    *_, state = training.steps(chosen, **keywords)
    return {key: tensor.clone() for key, tensor in state.model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["adam", "kbfgs"])
def test_resume_is_exact(tmp_path, name):
    chosen = settings(optimizer=name, epochs=2)
    for state in training.steps(chosen):
        if state.step == state.steps_per_epoch + 3:
            checkpoints.save(state, tmp_path / "here.pt")
    whole = {key: tensor.clone() for key, tensor in state.model.state_dict().items()}
    assert same(final(chosen, resume=tmp_path / "here.pt"), whole)


def test_the_seed_decides():
    assert same(final(settings(seed=1)), final(settings(seed=1)))
    assert not same(final(settings()), final(settings(SMALL)))


def test_an_augmentation_that_changes_nothing_leaves_training_as_it_is():
    nothing = replace(SMALL, augment=lambda pictures, _: pictures)
    assert same(final(settings(nothing)), final(settings(SMALL)))


def test_each_batch_is_augmented_once_and_only_to_train():
    seen = []

    def augment(pictures, generator):
        seen.append((len(pictures), torch.rand(1, generator=generator).item()))
        return crop_and_flip(pictures, generator)

    chosen = settings(replace(SMALL, augment=augment), "kbfgs", epochs=2)
    for state in training.steps(chosen):
        losses = training.evaluate(state, chosen.problem)
        assert losses == training.evaluate(state, SMALL)
    assert [size for size, _ in seen] == [50] * (3 * state.steps_per_epoch)  # warm-up, two epochs
    assert len({draw for _, draw in seen}) == len(seen)
