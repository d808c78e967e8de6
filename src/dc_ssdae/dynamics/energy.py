"""Explicit energies whose gradient is the field (Wang & Du 2025, "Equilibrium matching")."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def dot_energy(x: Tensor, answer: Tensor) -> Tensor:
    """E(x) = ⟨x, f(x)⟩ of a network's answer f: (B, …) and (B, …) -> (B,), of at least float32."""
    return (at_least_float32(x) * at_least_float32(answer)).flatten(1).sum(dim=1)


def l2_energy(x: Tensor, answer: Tensor) -> Tensor:
    """E(x) = ½‖f(x)‖² of a network's answer f: (B, …) and (B, …) -> (B,), of at least float32."""
    return 0.5 * at_least_float32(answer).square().flatten(1).sum(dim=1)


ENERGIES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"dot": dot_energy, "l2": l2_energy}
"""By name: an energy of x and of the network's answer there."""


def energy_gradient(
    network: Callable[[Tensor], Tensor], x: Tensor, energy: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """∇E at x (B, …), in x's dtype, of the energy of a network's answer.

    Where gradients are enabled it can itself be differentiated, by the network's parameters above all. It is computed
    under `torch.no_grad` and `torch.inference_mode` too; the network must then take its other tensors through
    `as_normal`.
    """
    trains = torch.is_grad_enabled()
    # PyTorch's fused attention kernels have no second derivative.
    kernels = sdpa_kernel(SDPBackend.MATH) if trains else nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), kernels:
        x = as_normal(x)
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        # Not the leaf itself: PyTorch's hooks on a module's inputs, such as its FLOP counter's, fail on leaves here.
        total = energy(x, network(x.view_as(x))).sum()
        (gradient,) = torch.autograd.grad(total, x, create_graph=trains)
    return gradient


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen half precision; float32 and float64 stay."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def as_normal(tensor: Tensor) -> Tensor:
    """A tensor that autograd can work with, where it is to: the same one, or a copy of one made in inference mode.

    torch.compile cannot ask whether a tensor is such a one, and need not: within a graph none is.
    """
    if torch.compiler.is_compiling():
        return tensor
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor
