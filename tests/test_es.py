"""common/es.py: the estimate against an analytic gradient, and N processes against one."""

import pytest
import torch
import torch.multiprocessing as mp

from common import es

SIZE = 12
HESSIAN = torch.diag(torch.linspace(0.5, 3, SIZE))
THETA = torch.linspace(-1, 1, SIZE)


def quadratic(population, ids):
    """0.5 theta' H theta plus a term that only the pair decides, which antithetic pairs must
    cancel."""
    return 0.5 * ((population @ HESSIAN) * population).sum(-1) + 10 * ids


def generation(**options):
    options = dict(pairs=4000, sigma=0.1, seed=3, generation=5) | options
    return es.gradient(THETA, quadratic, **options)


def test_estimate_meets_the_analytic_gradient_of_a_quadratic():
    grad, losses = generation(pairs=40_000)
    exact = HESSIAN @ THETA  # smoothing leaves a quadratic's gradient as it is
    assert losses.shape == (2, 40_000)
    assert (grad - exact).norm() < 0.05 * exact.norm()


def test_estimate_follows_its_definition():
    noise, losses = torch.randn(6, SIZE), torch.randn(2, 6)
    slow = sum(noise[i] * (losses[0, i] - losses[1, i]) / (2 * 0.3) for i in range(6)) / 6
    torch.testing.assert_close(es.estimate(noise, losses, 0.3), slow)


def test_chunks_change_nothing():
    whole, losses = generation()
    parts, same = generation(chunk=7)
    torch.testing.assert_close(losses, same)
    torch.testing.assert_close(whole, parts)


def test_each_generation_and_seed_has_its_own_directions():
    same = es.directions(8, SIZE, seed=0, generation=1)
    assert torch.equal(same, es.directions(8, SIZE, seed=0, generation=1))
    assert not torch.equal(same, es.directions(8, SIZE, seed=0, generation=2))
    assert not torch.equal(same, es.directions(8, SIZE, seed=1, generation=1))


def test_rank_shaping_ignores_the_scale_of_the_losses():
    noise, losses = torch.randn(50, SIZE), torch.randn(2, 50)
    shaped = es.estimate(noise, losses, 0.1, rank_shaping=True)
    torch.testing.assert_close(
        shaped, es.estimate(noise, losses.exp() * 1000, 0.1, rank_shaping=True)
    )
    ranks = es.centred_ranks(losses)
    assert ranks.min() == -0.5 and ranks.max() == 0.5
    assert torch.equal(ranks.flatten().argsort(), losses.flatten().argsort())


def test_equal_losses_share_their_mean_rank():
    ranks = es.centred_ranks(torch.tensor([[3.0, 1, 1], [7, 1, 3]]))
    assert torch.equal(ranks, torch.tensor([[3.5, 1, 1], [5, 1, 3.5]]) / 5 - 0.5)


def test_a_constant_loss_has_no_gradient():
    options = dict(pairs=32, sigma=0.1, seed=0, generation=0, rank_shaping=True)
    grad, _ = es.gradient(THETA, lambda population, ids: torch.ones(len(population)), **options)
    assert (grad == 0).all()


def one_of_two(rank, file, path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    torch.save(generation(pairs=64, chunk=10), f"{path}/{rank}")
    with pytest.raises(ValueError, match="cannot be shared evenly"):
        generation(pairs=63)
    value = torch.tensor([float(rank), 3.0])
    assert es.all_reduce_mean(value).tolist() == [0.5, 3.0] and value[0] == rank
    torch.distributed.destroy_process_group()


def test_the_mean_over_one_process_is_the_value():
    assert es.all_reduce_mean(THETA) is THETA


def test_two_processes_give_the_result_of_one(tmp_path):
    mp.start_processes(one_of_two, (tmp_path / "rendezvous", tmp_path), nprocs=2, start_method="forkserver")
    alone = generation(pairs=64, chunk=10)
    for rank in (0, 1):
        for mine, theirs in zip(
            alone, torch.load(tmp_path / str(rank), weights_only=True), strict=True
        ):
            torch.testing.assert_close(mine, theirs)
