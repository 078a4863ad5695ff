"""Decomposed on-policy distillation of vision-language models: prompts, rollouts, views, losses. Needs torch only."""

from steer_optim.vlm.analysis import angles_by_decile
from steer_optim.vlm.check import check_views
from steer_optim.vlm.distillation import Component, DecomposedDistillation, Decomposition
from steer_optim.vlm.divergences import Term, token_losses
from steer_optim.vlm.forward import response_logits, response_states, score
from steer_optim.vlm.gate import adaptive_strength, sampled_log_probs, top_share, visual_dependency, visual_tokens
from steer_optim.vlm.heads import Head, HiddenStates
from steer_optim.vlm.prompts import Prompts, Rollout, append_response, left_padded, render, text_only
from steer_optim.vlm.rollout import rollout
from steer_optim.vlm.topk import TopLogProbs, intersect, top_ids

__all__ = [
    "Component",
    "DecomposedDistillation",
    "Decomposition",
    "Head",
    "HiddenStates",
    "Prompts",
    "Rollout",
    "Term",
    "TopLogProbs",
    "adaptive_strength",
    "angles_by_decile",
    "append_response",
    "check_views",
    "intersect",
    "left_padded",
    "render",
    "response_logits",
    "response_states",
    "rollout",
    "sampled_log_probs",
    "score",
    "text_only",
    "token_losses",
    "top_ids",
    "top_share",
    "visual_dependency",
    "visual_tokens",
]
