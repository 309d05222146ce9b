"""The device as an object: `Smmu`, its registers, queues and stalls, and the faces of each.

Imports the engine; nothing of the operating system's half imports it but to hold an `Smmu`.
"""
