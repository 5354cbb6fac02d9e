"""Seconds of one training step of a whole setting: operators on one rank, messages between ranks, their sum."""
