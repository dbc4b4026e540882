"""Not Rockchip's package: a stand-in for mmchat's tests (tests/rknn_standin/README.md)."""

from rknnlite.api.rknn_lite import RKNNLite

__all__ = ["RKNNLite"]
