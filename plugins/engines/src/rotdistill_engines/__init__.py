"""Engines that answer in the teacher's name: OpenAI-compatible servers, and files of answers."""
