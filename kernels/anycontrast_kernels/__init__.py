"""Operations on packed tokens. Knows only torch (and triton or flash-attn where they are used)."""
