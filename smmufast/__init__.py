"""An Arm SMMUv3 that other simulators import."""
