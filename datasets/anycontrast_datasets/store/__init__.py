"""Stores: where prepared studies lie. One reader interface, checked bytes."""
