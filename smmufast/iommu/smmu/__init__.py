"""The driver of one SMMUv3: its queues, tables and entries, as Linux's arm-smmu-v3 has them."""
