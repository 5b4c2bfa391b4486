"""Keys and values kept between decode steps, and who owns which page of them."""

from jaxflash.cache.allocator import OutOfPages, PageAllocator
from jaxflash.cache.contiguous import KVCache
from jaxflash.cache.paged import PagedKVCache

__all__ = ["KVCache", "OutOfPages", "PageAllocator", "PagedKVCache"]
