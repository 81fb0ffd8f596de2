"""Patches to tokens: AMAE's dynamic convolution as one projection and a scale and shift.

AMAE gives contrast i the patch convolution (W * w(m_i), B * b(m_i)), m_i a vector of the contrast
and (w, b) linear in it. With kernel = stride that is the shared projection, scaled per channel and
shifted: one matrix product for the patches of all contrasts, then a row of scale and shift per
volume. `tests/test_tokenizer.py` holds the equality with a convolution per contrast.

Letters: N tokens, P voxels per patch, D width, V volumes, K descriptor values.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init

from anycontrast.models.blocks import Linear
from anycontrast_datasets.contrast import DESCRIPTOR_SIZE, NUM_CONTRAST_IDS


class DynamicTokenizer(nn.Module):
    """Project patches with weights that depend on their contrast.

    By default scale = 1 + Delta(m), shift = B + Delta(m), with Delta zero at the start: every
    contrast begins with the plain projection and learns to differ. `paper_exact` is the form of
    the paper, scale = w(m), shift = B * b(m), with PyTorch's default initialisation; tokens then
    start at about 0.3 of the plain projection's deviation and the position code drowns them.

    Args:
        num_voxels: P, voxels per patch.
        width: D.
        contrast_vector_size: length of m; from the number of contrasts on it adds no power.
        use_descriptor: add a linear map of the contrast descriptor to m, so that the physics of a
            contrast counts; an unknown descriptor is all zero and adds nothing.
        paper_exact: the multiplicative form of the paper.

    Source: AMAE, arXiv 2501.09096, section 2 (dynamic convolution tokenizer).
    """

    def __init__(
        self,
        num_voxels: int,
        width: int,
        *,
        contrast_vector_size: int,
        use_descriptor: bool = False,
        paper_exact: bool = False,
    ) -> None:
        super().__init__()
        self.paper_exact = paper_exact
        # The bias is no part of `projection`: the scale applies to the product, not to it.
        self.projection = Linear(num_voxels, width, bias=False)
        self.bias = nn.Parameter(self.projection.weight.new_zeros(width))
        self.contrast_vector = nn.Embedding(NUM_CONTRAST_IDS, contrast_vector_size)
        self.modulation = nn.Linear(contrast_vector_size, 2 * width)
        self.descriptor = (
            nn.Linear(DESCRIPTOR_SIZE, contrast_vector_size, bias=False) if use_descriptor else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise: Xavier for the projection (as MAE), identity or PyTorch's default for g."""
        init.xavier_uniform_(self.projection.weight)
        bound = self.projection.in_features**-0.5
        if self.paper_exact:
            init.uniform_(self.bias, -bound, bound)
            return
        init.zeros_(self.bias)
        # Unit length on average, whatever the size.
        init.normal_(self.contrast_vector.weight, std=self.contrast_vector.embedding_dim**-0.5)
        init.zeros_(self.modulation.weight)
        init.zeros_(self.modulation.bias)

    def forward(
        self, x_NP: Tensor, volume_N: Tensor, contrast_V: Tensor, descriptor_VK: Tensor
    ) -> Tensor:
        """Make tokens.

        Args:
            x_NP: [N, P] z-scores.
            volume_N: [N] int64, row of the tables below.
            contrast_V: [V] int64, vocabulary id.
            descriptor_VK: [V, K] float32, see `ContrastDescriptor.vector`.

        Returns:
            [N, D] in the dtype of the weights.
        """
        dtype = self.projection.weight.dtype
        scale_VD, shift_VD = self._scale_and_shift(contrast_V, descriptor_VK.to(dtype))
        projected_ND: Tensor = self.projection(x_NP.to(dtype))
        # F.embedding, not indexing: its backward pass is deterministic on several threads.
        tokens_ND = projected_ND * F.embedding(volume_N, scale_VD) + F.embedding(volume_N, shift_VD)
        return tokens_ND.to(dtype)

    def _scale_and_shift(self, contrast_V: Tensor, descriptor_VK: Tensor) -> tuple[Tensor, Tensor]:
        m_Vl: Tensor = self.contrast_vector(contrast_V)
        if self.descriptor is not None:
            m_Vl = m_Vl + self.descriptor(descriptor_VK)
        scale_VD, shift_VD = self.modulation(m_Vl).chunk(2, dim=-1)
        if self.paper_exact:
            return scale_VD, self.bias * shift_VD
        return 1.0 + scale_VD, self.bias + shift_VD
