"""A job's output: the file that the job itself writes, read from any offset and followed live.

What a stream promises (`OutputReader.stream`):

* An offset is a place in the file, always; chunks come in order, without overlap, each beginning where the
  one before ended; each offset is sent at most once.
* Finished job: the stream ends exactly at the recorded final size. Running, not followed: at the size the
  file had when the stream began. Running, followed: at the final size, once it is known.
* What cannot be read up to that end is announced as a gap, never skipped or sent as zeros: the head that was
  given back to the file system, and whatever is missing at the end because someone deleted or truncated the
  file.
* Truncated under a follower: the offset stays, the follower waits until the file has grown past it again.
  What the job wrote below it in the meantime is not sent a second time; a final size below it ends the
  stream.
* Deleted under a follower: the follower goes on reading the inode it has open. A stream that begins after the
  deletion finds a file of zero bytes, and tells all of it as a gap once the final size is known. If the file
  was deleted before the job ended, nobody knows that size: a follower that has the file open ends where it
  ends then, any other at once.

What cannot be promised: between the exit of a job and the news of it, a stray grandchild may write; a
follower may be sent such bytes, beyond the final size that it does not know yet. It then ends at once.

Facts relied upon:

* fallocate(2): a punched range reads as zeros, and the file's size stays. lseek(2): SEEK_DATA gives the
  beginning of the first data, ENXIO if only a hole is left; a file system that knows no holes answers with
  the offset itself. So the bytes below SEEK_DATA(0) are gone, if the supervisor punches only the head, at
  multiples of 4096 and of the file system's block, and only where it has seen that a punched head shows in
  SEEK_DATA.
* A hole that opens before or under a read shows as zeros at the edge of a page (`may_have_hole`). Only then
  is SEEK_DATA asked: after the read, so that the answer covers all that was punched before or during it; and
  in a thread, since it waits for the inode's lock, which a throttled writer can hold for 200 ms.
* Zeros further on, written or skipped by the job, are data. A job that begins its output with a hole
  (ftruncate, lseek), or with blocks of zeros on a file system that stores these as holes (ZFS), is told as a
  gap there.
* inotify(7): IN_MODIFY comes after the write, truncation or punch it tells of; equal events at the queue's
  end are merged; IN_Q_OVERFLOW means that events were lost.
* preadv2(2): RWF_NOWAIT reads what is in the page cache and gives EAGAIN instead of waiting for the disk,
  EOPNOTSUPP where it is not implemented.
"""

from worker_svc.output.reader import Chunk, OutputReader, Room, Start

__all__ = ["Chunk", "OutputReader", "Room", "Start"]
