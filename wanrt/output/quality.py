"""One quality scale for every codec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from wanrt.errors import UsageError

# (CRF at quality 0, CRF at quality 100). Anchored where encoders' own documentation says that scales meet:
# x264's default CRF 23 looks like x265's default 28 (x265 documentation, "Rate Control"), SVT-AV1's default
# 35 (SVT-AV1 Docs/CommonQuestions.md) and VP9's recommended 31 to 33 (Google, "VP9 encoding modes").
CRF_SCALES: dict[str, tuple[float, float]] = {
    "h264": (36, 12),
    "hevc": (42, 14),
    "av1": (55, 15),
    "vp9": (55, 10),
}
CRF_LIMITS: dict[str, int] = {"h264": 51, "hevc": 51, "av1": 63, "vp9": 63}


@dataclass(frozen=True)
class Quality:
    """A quality from 0 (small file) to 100 (visually lossless), or a codec's own CRF.

    On the scale each step of 25 is 6 CRF of H.264, about half the bytes: 0 is CRF 36, 50 is 24, 75 (default)
    is 18, 100 is 12; other codecs follow `CRF_SCALES` to look alike. GIF and PNG have no such setting and
    ignore it.
    """

    value: float = 75
    is_crf: bool = False

    def __post_init__(self) -> None:
        limit = 63 if self.is_crf else 100
        if not 0 <= self.value <= limit:
            name = "crf" if self.is_crf else "quality"
            raise UsageError(f"{name}: got {self.value:g}, expected 0 to {limit}")

    @classmethod
    def parse(cls, value: Quality | float | str) -> Self:
        """75, "75" or "crf=18".

        Raises:
            UsageError: for anything else.
        """
        if isinstance(value, Quality):
            return cls(value.value, value.is_crf)
        name, _, number = str(value).rpartition("=")
        try:
            if name.strip() not in ("", "quality", "crf"):
                raise ValueError(name)
            return cls(float(number), name.strip() == "crf")
        except ValueError as error:
            raise UsageError(f"quality: got {value!r}, expected 0 to 100, or crf=N") from error

    def crf(self, codec: str) -> float:
        """The constant rate factor for a codec of `CRF_SCALES`.

        Raises:
            UsageError: when an explicit CRF is above the codec's own limit.
        """
        if self.is_crf:
            if self.value > CRF_LIMITS[codec]:
                raise UsageError(f"crf: got {self.value:g}, expected 0 to {CRF_LIMITS[codec]} for {codec}")
            return self.value
        low, high = CRF_SCALES[codec]
        return round(low + (high - low) * self.value / 100, 2)
