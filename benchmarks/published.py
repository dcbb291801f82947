"""What the benchmarks compare with: episodes and ridge calibration done the way published search
code does them.

Written here from a description of that way, on the same adapters as the rest, so that only the
approach differs:

- an episode loads a saved state dict, cuts every pruned projection by copying, hooks a NaN check
  onto every module, and evaluates with the logits of the whole block;
- calibration solves one ridge regression for each pruned column, and forms the Gram matrix X^T X
  again for each.

Where there was a choice it was made in favour of the published way: the state dict comes from the
page cache, and kept inputs are cut out of X once per module, not once per column. """
import torch
from torch.nn import functional as F

from ffp_nb.core.modeling import set_heads


def _linears(m):
    "The linear layers of a module with their full shapes"
    for lin, n in m.rows:
        yield lin, (m.units * n, lin.in_features)
    yield m.out, (m.out.out_features, m.units * m.cols)


def _set_sizes(m, k):
    "Tell the layers of a module that they have k units"
    for lin, n in m.rows:
        lin.out_features = k * n
    m.out.in_features = k * m.cols
    if m.attn is not None:
        set_heads(m.block, m.attn, *(k * n for n in m.heads))


def clone_weights(layout) -> dict:
    "Copies of all prunable weights and biases, by linear layer"
    clone = lambda p: None if p is None else p.data.clone()
    return {lin: (clone(lin.weight), clone(lin.bias)) for m in layout.modules.values()
            for lin, _ in _linears(m)}


def put_back(layout, saved: dict) -> None:
    "Give the layers the weights of `clone_weights`"
    for m in layout.modules.values():
        _set_sizes(m, m.units)
        for lin, _ in _linears(m):
            lin.weight.data = saved[lin][0]
            if saved[lin][1] is not None:
                lin.bias.data = saved[lin][1]


def slice_by_copy(layout,
                  kept: dict,  # (layer, kind) -> indices of the units to keep, ascending
                  ) -> None:
    "Cut the weights of a dense model down to the kept units"
    for key, m in layout.modules.items():
        index = lambda n: (kept[key][:, None] * n + torch.arange(n)).flatten()
        for lin, n in m.rows:
            lin.weight.data = lin.weight.data[index(n)]
            if lin.bias is not None:
                lin.bias.data = lin.bias.data[index(n)]
        m.out.weight.data = m.out.weight.data[:, index(m.cols)]
        _set_sizes(m, len(kept[key]))


def reset_from_disk(model, layout, path) -> None:
    "The dense weights again, from a saved state dict"
    state = torch.load(path, weights_only=True)
    for m in layout.modules.values():
        _set_sizes(m, m.units)
        for lin, shape in _linears(m):
            lin.weight.data = lin.weight.new_empty(shape)
            if lin.bias is not None:
                lin.bias.data = lin.bias.new_empty(shape[0])
    model.load_state_dict(state)


def nan_hooks(model) -> list:
    "Hooks on every module that raise FloatingPointError at the first NaN"
    def check(module, args, out):
        first = out[0] if isinstance(out, tuple) else out
        if isinstance(first, torch.Tensor) and torch.isnan(first).any():
            raise FloatingPointError(f'NaN in the output of a {type(module).__name__}')
    return [m.register_forward_hook(check) for m in model.modules()]


@torch.inference_mode()
def whole_logits_nll(model, blocks) -> float:
    "Mean nats per token, with the logits of a whole block at once"
    total = 0.0
    for ids in blocks.ids.split(1):
        logits = model(ids, use_cache=False).logits[:, -blocks.scored - 1:-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, -blocks.scored:].flatten(),
                                 reduction='sum').item()
    return total / (len(blocks) * blocks.scored)


def episode(model, layout, path, kept, blocks, hooks: bool = True) -> float:
    "One episode: reset, slice, evaluate; mean nats per token"
    reset_from_disk(model, layout, path)
    slice_by_copy(layout, kept)
    handles = nan_hooks(model) if hooks else []
    try:
        return whole_logits_nll(model, blocks)
    finally:
        for h in handles:
            h.remove()


def fit_column(X_kept: torch.Tensor,  # (tokens, c) inputs that stay
               x: torch.Tensor,  # (tokens,) the removed input
               W_kept: torch.Tensor,  # (D, c) changed in place
               w: torch.Tensor,  # (D,) the removed input's column of the projection
               alpha: float) -> torch.Tensor:  # (c,) coefficients
    "Regress one removed input on the kept ones, and fold it into their weights"
    A = X_kept.T @ X_kept
    A.diagonal().mul_(1 + alpha)
    coef = torch.linalg.solve(A, X_kept.T @ x)
    W_kept.addr_(w, coef)
    return coef


def fit_module(W: torch.Tensor,  # (D, n) output projection, kept columns first
               gram: torch.Tensor,  # (n, n) in the same order
               c: int,  # columns kept
               alpha: float) -> tuple[torch.Tensor,
                                      torch.Tensor]:  # (D, c) weights, (c, n - c) coefficients
    """All removed inputs of a module at once, from one Gram matrix: the obvious improvement on
    `fit_column`"""
    A = gram[:c, :c].double()
    A.diagonal().mul_(1 + alpha)
    coef = torch.cholesky_solve(gram[:c, c:].double(), torch.linalg.cholesky(A)).float()
    return W[:, :c].float() + W[:, c:].float() @ coef.T, coef
