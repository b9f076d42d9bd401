"""Divergences in chunks against full float64 matrices, autograd and TRL, gradients included."""

import pytest
import torch

from rayrlhf.models import distillation
from rayrlhf.models import logprobs as chunking
from rayrlhf.models.distillation import FullTeacher, TopTeacher, divergence, most_likely

ROWS, WIDTH, TEACHER_WIDTH, WORDS = 13, 6, 9, 31


def drawn(seed=0):
    """Student's and teacher's states and layers, float64, in every case with a bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(ROWS, WIDTH), (WORDS, WIDTH), (WORDS,), (ROWS, TEACHER_WIDTH), (WORDS, TEACHER_WIDTH), (WORDS,)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def kl(first, second):
    return torch.where(first > 0, first * (first / second).log(), 0.0).sum()


def generalized(p, q, beta):
    """Equation 1 of Agarwal et al. (2024) for one teacher p and one student q."""
    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    middle = beta * p + (1 - beta) * q
    return beta * kl(p, middle) + (1 - beta) * kl(q, middle)


def whole_matrix(hidden, weight, bias, teacher, kept, beta):
    """The formula on full matrices, differentiated by autograd; `kept` most likely tokens and the rest, or all when None."""
    student, teacher = (hidden @ weight.T + bias).log_softmax(-1), teacher.log_softmax(-1)
    total = torch.zeros(ROWS, dtype=torch.float64)
    for row in range(ROWS):
        chosen = teacher[row].argsort(descending=True)[:kept]
        others = torch.tensor([word for word in range(WORDS) if word not in chosen.tolist()])
        p, q = teacher[row].exp(), student[row].exp()
        if len(others):
            p, q = (torch.cat([part[chosen], part[others].sum()[None]]) for part in (p, q))
        total[row] = generalized(p, q, beta)
    return total


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kept", [None, 1, 5, WORDS])
@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_a_divergence_and_its_gradients_are_those_of_full_matrices(monkeypatch, kept, rows_at_once, beta):
    monkeypatch.setattr(chunking, "CHUNK_BYTES", 4 * WORDS * rows_at_once)
    hidden, weight, bias, *layer = drawn(rows_at_once)
    upstream = torch.randn(ROWS, dtype=torch.float64)
    wanted = [part.clone().requires_grad_() for part in (hidden, weight, bias)]
    expected = whole_matrix(*wanted, layer[0] @ layer[1].T + layer[2], kept, beta)
    (expected * upstream).sum().backward()
    single = [part.float() for part in layer]
    teacher = FullTeacher(*single) if kept is None else TopTeacher(*most_likely(*single, kept))
    ours = [part.float().requires_grad_() for part in (hidden, weight, bias)]
    found = divergence(*ours, teacher, beta)
    (found * upstream.float()).sum().backward()
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kept", [None, WORDS])
def test_loss_and_gradient_over_the_whole_vocabulary_are_those_of_trl(beta, kept):
    from trl.experimental.gkd import GKDTrainer

    hidden, weight, bias, *layer = (part.float() for part in drawn(5))
    theirs, ours = ([part.clone().requires_grad_() for part in (hidden, weight, bias)] for _ in range(2))
    logits = theirs[0] @ theirs[1].T + theirs[2]
    labels = torch.zeros(1, ROWS, dtype=torch.long)
    wanted = GKDTrainer.generalized_jsd_loss(logits[None], (layer[0] @ layer[1].T + layer[2])[None], labels, beta=beta)
    wanted.backward()
    teacher = FullTeacher(*layer) if kept is None else TopTeacher(*most_likely(*layer, kept))
    found = divergence(*ours, teacher, beta).mean()
    found.backward()
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_the_most_likely_tokens_and_the_rest_make_a_whole():
    _, _, _, *layer = (part.float() for part in drawn(3))
    ids, logprobs = most_likely(*layer, 4)
    full = (layer[0] @ layer[1].T + layer[2]).log_softmax(-1)
    torch.testing.assert_close(logprobs[:, :-1], full.topk(4).values)
    assert torch.equal(ids, full.topk(4).indices)
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(ROWS))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_student_that_is_its_teacher_has_no_divergence_and_fewer_outcomes_never_have_more(beta):
    hidden, weight, bias, *layer = (part.float() for part in drawn(7))
    assert divergence(hidden, weight, bias, FullTeacher(hidden, weight, bias), beta).abs().max() < 1e-6
    full = divergence(hidden, weight, bias, FullTeacher(*layer), beta)
    for count in (1, 3, 10):
        assert (divergence(hidden, weight, bias, TopTeacher(*most_likely(*layer, count)), beta) <= full + 1e-5).all()


def test_only_what_needs_a_gradient_gets_one_and_autocast_is_followed():
    hidden, weight, _, *layer = (part.float() for part in drawn(9))
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = divergence(hidden, weight, None, FullTeacher(*layer))
    found.sum().backward()
    exact = divergence(hidden.detach(), weight, None, FullTeacher(*layer))
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.3
    assert weight.grad is None
    assert hidden.grad.isfinite().all()


def test_a_student_that_is_its_teacher_has_no_gradient_when_only_the_forward_pass_is_under_autocast():
    hidden, weight, bias, *_ = (part.float() for part in drawn(11))
    student = hidden.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = divergence(student, weight, bias, FullTeacher(hidden, weight, bias))
    found.sum().backward()
    assert student.grad.abs().max() == 0


@pytest.mark.parametrize("kept", [None, 5])
def test_logits_of_all_places_never_exist_at_once(monkeypatch, kept):
    monkeypatch.setattr(chunking, "CHUNK_BYTES", 4 * WORDS * 2)
    hidden, weight, bias, *layer = (part.float() for part in drawn(13))
    shapes, original = [], distillation.logits_into

    def spy(*arguments):
        logits = original(*arguments)
        shapes.append(len(logits))
        return logits

    monkeypatch.setattr(distillation, "logits_into", spy)
    teacher = FullTeacher(*layer) if kept is None else TopTeacher(*most_likely(*layer, kept))
    divergence(hidden.requires_grad_(), weight, bias, teacher).sum().backward()
    assert max(shapes) == 2
    # Full: student and teacher, forward and backward. Most likely ones: the teacher once, the student forward and backward.
    assert sum(shapes) == (4 if kept is None else 3) * ROWS


@pytest.mark.parametrize("beta", [0.5, 1.0])
@pytest.mark.parametrize("lead", [50.0, 92.5, 200.0])
def test_other_divergences_are_finite_however_sure_the_student_is(lead, beta):
    teacher = TopTeacher(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.3, 0.2]]).log())
    student = torch.tensor([[lead, 0.0, 0.0, 0.0]]).log_softmax(-1)
    exact = student.double()
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.cat([exact[0, :2].exp(), exact[0, 2:].exp().sum()[None]])
    found = teacher.divergence(slice(0, 1), student.clone(), beta)
    torch.testing.assert_close(found[0].double(), generalized(p, q, beta), atol=1e-5, rtol=1e-5)
    assert teacher.gradient(slice(0, 1), student.clone(), beta).isfinite().all()


@pytest.mark.parametrize("lead", [50.0, 92.5, 200.0])
def test_the_top_k_gradient_is_finite_however_sure_the_student_is(lead):
    teacher = TopTeacher(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.3, 0.2]]).log())
    logits = torch.tensor([[lead, 0.0, 0.0, 0.0]])
    gradient = teacher.gradient(slice(0, 1), logits.log_softmax(-1))
    exact = logits.double().log_softmax(-1)
    rest = exact[:, 2:].logsumexp(-1, keepdim=True)
    wanted = exact.exp() - torch.tensor([[0.5, 0.3, 0.0, 0.0]], dtype=torch.float64)
    wanted[:, 2:] -= 0.2 * (exact[:, 2:] - rest).exp()
    torch.testing.assert_close(gradient.double(), wanted, atol=1e-6, rtol=0)
