"""The DICOM tags that are read at all, and what becomes of each; no other tag is ever looked at.

A tag that is not in `KEPT_TAGS` does not reach this code: private blocks, overlays, comments and
physicians' names included. The table is the report of what a scan keeps.

Source: DICOM PS3.15 E (what identifies); private b-values as dcm2niix documents them per vendor.
"""

import re
from collections.abc import Mapping

_USES: Mapping[str, str] = {
    "keyed pseudonym": "PatientID PatientName StudyInstanceUID",
    "keyed site": "InstitutionName DeviceSerialNumber StationName",
    "vote on the contrast, not stored": "SeriesDescription ProtocolName",
    "grouping and checks, not stored": (
        "SeriesInstanceUID SOPClassUID SOPInstanceUID InstanceNumber AcquisitionNumber "
        "NumberOfFrames ImagesInAcquisition Rows Columns BitsAllocated SamplesPerPixel Modality "
        "PhotometricInterpretation BurnedInAnnotation ComplexImageComponent"
    ),
    "geometry": "ImagePositionPatient ImageOrientationPatient PixelSpacing",
    "physics, as a number": (
        "EchoTime RepetitionTime InversionTime FlipAngle MagneticFieldStrength EchoTrainLength "
        "DiffusionBValue EffectiveEchoTime InversionTimes"
    ),
    "physics, as words of a fixed list": (
        "ImageType ScanningSequence SequenceVariant MRAcquisitionType SequenceName "
        "PulseSequenceName EchoPulseSequence EchoPlanarPulseSequence InversionRecovery "
        "ContrastBolusAgent"
    ),
    "face, as words of a fixed list": (
        "RecognizableVisualFeatures DeidentificationMethod CodeValue"
    ),
    "holds other tags of this list": (
        "SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence MREchoSequence "
        "MRTimingAndRelatedParametersSequence MRModifierSequence MRDiffusionSequence "
        "PlanePositionSequence PlaneOrientationSequence PixelMeasuresSequence "
        "ContrastBolusAgentSequence DeidentificationMethodCodeSequence"
    ),
}
KEPT_TAGS: Mapping[str, str] = {
    keyword: use for use, keywords in _USES.items() for keyword in keywords.split()
}
"""Keyword -> what becomes of its value."""

PRIVATE_B_VALUES: tuple[tuple[int, int, str], ...] = (
    (0x0019, 0x0C, "SIEMENS MR HEADER"),
    (0x0043, 0x39, "GEMS_PARM_01"),
    (0x2001, 0x03, "Philips Imaging DD 001"),
)
"""Group, element in the block, creator: where vendors keep the b-value of classic images."""

IMAGE_TYPES = re.compile(
    "ORIGINAL|DERIVED|PRIMARY|SECONDARY|M|MAGNITUDE|P|PHASE|PHASE_MAP|B0_MAP|R|REAL|I|IMAGINARY|"
    "FFE|SE|ND|NORM|DIS2D|DIS3D|FM|FIL|MOSAIC|DIFFUSION|ADC|EADC|TRACE|TRACEW|ISOTROPIC|FA|COLFA|"
    "TENSOR|SWI|CBF|RELCBF|CBV|RELCBV|MTT|RELMTT|TTP|LOCALIZER|MIP|MINIP|MNIP|MPR|PROJECTION|"
    "PROJECTION_IMAGE|REFORMATTED|RESAMPLED|CSA_RESAMPLED|CSA_MPR|SUBTRACT|SUBTRACTION|SCREEN|"
    "SCREENSAVE|SCREEN_SAVE|CAPTURE|VOLUME_RENDER|T1_MAP|T2_MAP|T2_STAR_MAP|RHO|MEAN|STDDEV|NONE|"
    "OTHER|AXIAL|WATER|FAT|IN_PHASE|OUT_PHASE|UNI|INV1|INV2|COMBINED|MONTAGE|RGB"
)
"""Of ImageType, blanks as `_`."""
SEQUENCES = re.compile("SE|IR|GR|EP|RM")
VARIANTS = re.compile("SK|MTC|SS|TRSS|SP|MP|OSP|NONE")
SEQUENCE_WORDS = re.compile(
    r"ep_?b\d{1,4}|ep2d|ep3d|epfid|epse|epi|tfl3?d?|tse|fse|haste|spc|space|cube|vista|tir|"
    r"mprage|mp2rage|bravo|f?spgr|flair|swi|swan|fl[23]d|gre|ffe|vibe|se2d|se"
)
"""Found anywhere in a sequence name, which is free text."""
FACE_TOOLS = re.compile(r"reface|deface|quickshear|facemask|skull.?strip|stripped")
"""Found anywhere in the de-identification method, which is free text."""
CLEANED_FEATURES = "113102"
"""Code of the option that changes a face (DICOM PS3.16 CID 7050)."""
