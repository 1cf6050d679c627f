"""Methods of a tensor that move its elements, and whose adjoint is their inverse."""

BIJECTIONS = frozenset(
    {
        *("contiguous", "flatten", "moveaxis", "movedim", "permute", "reshape", "squeeze", "swapaxes", "swapdims"),
        *("t", "transpose", "unflatten", "unsqueeze", "view"),
    }
)
