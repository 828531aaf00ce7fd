"""The networks. Each file is one network, readable top to bottom; importing it registers its names."""

from fastpose.models import (  # noqa: F401
    efficient_hrnet,
    hrnet,
    hrnet_ae,
    lightweight_hrnet,
    mobileposenet,
)
from fastpose.models._registry import create_model, list_models, register_model

__all__ = ["create_model", "list_models", "register_model"]
