"""Pure maths on tensors: everything between the models' forwards and the optimizer. Imports torch only.

Tensors are response-aligned and right-padded, [B, T]: column j is response token j. Masks are bool. The action mask is True on
the tokens the policy sampled, the value mask also on the slot that receives the score. What stands behind a mask may be
anything, NaN included: it reaches no result and no gradient, and results are 0 there.
"""
