"""Pure maths on tensors between the forward passes and the optimizer. Imports torch only.

Tensors are response-aligned and right-padded, [B, T]: column j is response token j. Masks are bool. The action mask is True on
the tokens that the policy sampled, the value mask also on the slot that receives the score. Masked positions may hold anything,
NaN included: they affect no result and no gradient, and results are 0 there.
"""
