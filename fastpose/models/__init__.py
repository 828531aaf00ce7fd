"""The networks. Each file is one network, readable top to bottom; importing it registers its names."""

from fastpose.models import (  # noqa: F401
    efficient_hrnet,
    hr_litenet,
    hrnet,
    hrnet_ae,
    le_hrnet,
    lightweight_hrnet,
    mobileposenet,
    simplebaseline,
)
from fastpose.models._registry import create_model, list_models, register_model

__all__ = ["create_model", "list_models", "register_model"]
