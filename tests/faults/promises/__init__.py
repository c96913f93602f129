"""One module for each promise that needs no WhatsApp client."""
