"""Credit by turns: a turn of a conversation is one step, with a reward of its own, and its tokens share one advantage.

Turn k of episode i has reward r_ik. What stands on it of a KL in the reward is taken off there.

    G_ik     = r_ik + gamma G_i,k+1             what the turn and all that followed it earned; 0 where there is no turn
    A_ik     = G_ik normalised over turn k of all episodes of the group that have one
    A_ik     = delta_ik + gamma lam A_i,k+1,    delta_ik = r_ik + gamma V_i,k+1 - V_ik        GAE, a turn as one step

The first is an action's return in the policy gradient theorem (Sutton et al. 1999), with a baseline by the number of
the turn. The second is GAE (1506.02438, eq. 16) of the decision process whose actions are whole turns (2512.17008):
V_ik is the critic where turn k begins, after all that others said before it. A group's A of one turn is that of a
single answer; GAE's differs by its lambda, which does not act between the tokens of a turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.objectives.composition import Composition
from pipeline.objectives.terms import advantages as adv


@dataclass(frozen=True)
class Turns:
    """Turns of S episodes of at most T tokens.

    numbers: [S, T] int64: of the turn that a trained token is of, from 0, never falling; -1 on untrained tokens.
    rewards: [S, K] floating, of each turn; K above every number, 0 behind an episode's last turn.
    """

    numbers: Tensor
    rewards: Tensor

    def __post_init__(self) -> None:
        if self.numbers.dim() != 2 or self.numbers.dtype != torch.int64:
            raise ValueError(f"numbers are [episodes, tokens] int64, got {list(self.numbers.shape)}")
        if self.rewards.dim() != 2 or len(self.rewards) != len(self.numbers):
            raise ValueError(f"rewards are [{len(self.numbers)} episodes, turns], got {list(self.rewards.shape)}")
        if self.numbers.numel() and int(self.numbers.max()) >= self.rewards.shape[1]:
            raise ValueError(f"a token is of turn {int(self.numbers.max())} of {self.rewards.shape[1]}")
        if (self.rewards[self.behind] != 0).any():
            raise ValueError("a turn that an episode does not have has a reward")

    @property
    def behind(self) -> Tensor:
        """[S, K] bool: turns that an episode does not have."""
        none = self.numbers.new_full((len(self.numbers), 1), -1)
        last = torch.cat([none, self.numbers], -1).amax(-1, keepdim=True)
        return torch.arange(self.rewards.shape[1], device=last.device) > last

    @property
    def first(self) -> Tensor:
        """[S, T] bool: where a turn begins."""
        seen = self.numbers.cummax(-1).values
        before = torch.cat([seen.new_full((len(seen), 1), -1), seen[:, :-1]], -1)
        return self.numbers > before

    def sums(self, tokens: Tensor) -> Tensor:
        """[S, K]: sums over each turn's tokens of a [S, T] matrix."""
        own = torch.where(self.numbers >= 0, tokens, 0.0)
        return self.rewards.new_zeros(self.rewards.shape).scatter_add(1, self.numbers.clamp(min=0), own)

    def at_tokens(self, turns: Tensor) -> Tensor:
        """[S, T]: of each token its turn's number in a [S, K] matrix; 0 on untrained tokens."""
        return torch.where(self.numbers >= 0, turns.gather(1, self.numbers.clamp(min=0)), 0.0)


def returns_by_turn(rewards: Tensor, gamma: float) -> Tensor:
    """G_k = r_k + gamma G_{k+1}; rewards: [S, K]. Returns [S, K]."""
    out = rewards.clone()
    for k in range(rewards.shape[1] - 2, -1, -1):
        out[:, k] += gamma * out[:, k + 1]
    return out


def gae_by_turn(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """A_k = delta_k + gamma lam A_{k+1}; rewards: [S, K]. values: [S, K], 0 where there is no turn. Returns [S, K]."""
    after = torch.cat([values[:, 1:], values.new_zeros(len(values), 1)], -1)
    return returns_by_turn(rewards + gamma * after - values, gamma * lam)


def turn_advantages(
    cells: Composition, turns: Turns, group_ids: Tensor, penalty: Tensor | None, values: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(A, R), [S, T], 0 on untrained tokens. R is what the critic regresses on, None without one: at every token of a
    turn the turn's A + V, and what the tokens before it in the turn have paid already.

    group_ids: [S]. penalty: [S, T], beta times a KL estimate. values: [S, T], finite on trained tokens; for gae.
    A turn that one episode of its group alone has gets 0 of a group's baseline: there is nothing to compare it with.
    """
    first, rewards = turns.first, turns.rewards
    paid = 0.0 if penalty is None else _paid(turns, penalty)
    if penalty is not None:
        rewards = rewards - turns.sums(penalty)
    if cells.advantage == "gae":
        assert values is not None
        begun = turns.sums(torch.where(first, values, 0.0))
        advantages = gae_by_turn(rewards, begun, cells.gae_gamma, cells.gae_lambda)
        return turns.at_tokens(advantages), turns.at_tokens(advantages + begun) + paid
    earned = returns_by_turn(rewards, cells.turn_gamma)
    if cells.advantage == "batch_std":
        to_come = turns.at_tokens(earned) + paid
        return adv.whiten(to_come, turns.numbers >= 0, cells.std_epsilon, cells.std), None
    there = ~turns.behind
    keys = group_ids[:, None] * rewards.shape[1] + torch.arange(rewards.shape[1], device=group_ids.device)
    out = torch.zeros_like(earned)
    if cells.advantage == "group_mean":
        out[there] = adv.group_mean(earned[there], keys[there])
    elif cells.advantage == "group_std":
        out[there] = adv.group_std(earned[there], keys[there], cells.std_epsilon, cells.std)
    else:
        adv.refuse_alone(group_ids)
        out[there] = adv.leave_one_out(earned[there], keys[there], alone=True)
    return turns.at_tokens(out), None


def _paid(turns: Turns, penalty: Tensor) -> Tensor:
    """[S, T]: penalties of the tokens that stand before a token in its turn; 0 on untrained tokens."""
    own = torch.where(turns.numbers >= 0, penalty, 0.0)
    before = own.cumsum(-1) - own
    begun = turns.at_tokens(turns.sums(torch.where(turns.first, before, 0.0)))
    return torch.where(turns.numbers >= 0, before - begun, 0.0)
