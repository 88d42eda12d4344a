"""What happens to a finished model: conversion to GGUF, upload to the Hugging Face hub."""
