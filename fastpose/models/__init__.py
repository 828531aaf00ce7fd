"""The networks. Each file is one network, readable top to bottom; importing it registers its names."""

from fastpose.models import (  # noqa: F401
    dite_hrnet,
    efficient_hrnet,
    ghostnet_pose,
    hr_litenet,
    hrnet,
    hrnet_ae,
    le_hrnet,
    lightweight_hrnet,
    lite_csw_hrnet,
    lite_hrnet,
    mobilenetv2_pose,
    mobilenetv3_pose,
    mobileposenet,
    shufflenetv2_pose,
    simplebaseline,
    x_hrnet,
)
from fastpose.models._registry import create_model, is_bottom_up, list_models, model_entry, register_model

__all__ = ["create_model", "is_bottom_up", "list_models", "model_entry", "register_model"]
